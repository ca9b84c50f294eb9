# SPDX-License-Identifier: Apache-2.0
"""LocalLinearAttention: the operator's mathematics, caches, padding, packed sequences, lambda, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tilewright.nn import LocalLinearAttention, MixerCache, mixers
from tilewright.reference.local_linear_attention import lla_reference

HIDDEN, HEADS = 24, 4
CASES = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "no-norm": {"qk_norm": False, "learn_lambda": None, "ridge_lambda": 0.3},
    "token-rotary": {"learn_lambda": "token", "rope_theta": 100.0},
    "wide-window": {"head_dim": 40, "window_size": 7, "num_kv_heads": 1},
    "warm": {"head_dim": 40, "warm_start": True},
}
EXACT = 1e-10  # float64; the conjugate gradients of the wide heads go on until rounding stops them


def make(case: str, dtype: torch.dtype = torch.float64) -> LocalLinearAttention:
    torch.manual_seed(3)
    return LocalLinearAttention(HIDDEN, HEADS, layer_idx=1, cg_rtol=1e-13, cg_max_iters=300, **CASES[case]).to(dtype)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, dtype=dtype)


def close(got: Tensor, need: Tensor, bound: float = EXACT) -> None:
    assert got.shape == need.shape
    assert (got - need).norm() <= bound * need.norm()


def by_oracle(mixer: LocalLinearAttention, x: Tensor) -> Tensor:
    """The layer with the dense solve in place of the operator."""
    q, k, v = mixer._project(x, torch.arange(x.shape[1])[None])
    o, _ = lla_reference(q, k, v, ridge_lambda=mixer.ridge(x), window_size=mixer.window_size)
    return mixer.o_proj(o.flatten(-2))


def test_equals_the_dense_solve_in_values_and_gradients(case: str) -> None:
    mixer, x = make(case), inputs(2, 14).requires_grad_()
    y, weights, cache = mixer(x)
    assert weights is cache is None
    want = by_oracle(mixer, x)
    close(y, want)
    weight = torch.randn_like(y)
    learned = [x, *mixer.parameters()]
    got, exact = (torch.autograd.grad(out, learned, weight, retain_graph=True) for out in (y, want))
    for a, b in zip(got, exact, strict=True):
        close(a, b, 1e-8)


@pytest.mark.parametrize("cuts", [[9], [1], [3, 4, 5, 6, 7], list(range(1, 14))])
def test_pieces_with_a_cache_equal_the_whole(case: str, cuts: list[int]) -> None:
    mixer, x = make(case), inputs(2, 14)
    whole, _, _ = mixer(x)
    cache, pieces = MixerCache(), []
    for piece in torch.tensor_split(x, cuts, dim=1):
        y, _, given = mixer(piece, past_key_values=cache)
        assert given is cache
        pieces.append(y)
    close(torch.cat(pieces, 1), whole)
    assert [cache.get_seq_length(i) for i in (0, 1)] == [0, 14]
    assert cache.is_croppable == (not mixer.warm_start or "rho" not in cache[1])


def test_a_cropped_cache_goes_on_as_if_nothing_had_come() -> None:
    mixer, x = make("plain"), inputs(2, 10)
    mixer.layer_idx = 0
    _, _, cache = mixer(x, use_cache=True)
    cache.crop(-3)
    y, _, _ = mixer(x[:, 7:], past_key_values=cache)
    close(y, mixer(x)[0][:, 7:])


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(case: str, side: str) -> None:
    """Whole, and continued from a padded cache by a chunk and by single tokens."""
    mixer, real = make(case), inputs(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, {"left": slice(0, 4), "right": slice(5, 9), "middle": slice(2, 6)}[side]] = 0
    if side == "right":
        mask[1, 9:] = 0
    mask[:, 9:] = 1 if side != "right" else mask[:, 9:]
    alone = real[1:, mask[1].bool()]
    counted = (mask.cumsum(1) - 1).clamp_min(0)
    want, _, _ = mixer(alone)
    garbled = real.masked_fill(mask[..., None] == 0, 1e3)
    y, _, _ = mixer(garbled, attention_mask=mask, position_ids=counted)
    close(y[1:, mask[1].bool()], want)
    assert (y[1, mask[1] == 0] == 0).all()
    close(y[:1], mixer(real[:1])[0])
    first, _, cache = mixer(garbled[:, :7], attention_mask=mask[:, :7], position_ids=counted[:, :7], use_cache=True)
    rest = [first]
    for part in (slice(7, 9), slice(9, 10), slice(10, 11), slice(11, 12)):
        y, _, _ = mixer(
            garbled[:, part],
            attention_mask=mask[:, : part.stop],
            past_key_values=cache,
            position_ids=counted[:, part],
        )
        rest.append(y)
    close(torch.cat(rest, 1)[1:, mask[1].bool()], want)


def test_packed_sequences_are_separate(case: str) -> None:
    mixer, x = make(case), inputs(1, 17)
    offsets = torch.tensor([0, 5, 5, 6, 17])
    packed, _, _ = mixer(x, cu_seqlens=offsets)
    for first, last in ((0, 5), (5, 6), (6, 17)):
        close(packed[:, first:last], mixer(x[:, first:last])[0])
    assert mixer(x[:, :0], cu_seqlens=torch.tensor([0]))[0].shape == (1, 0, HIDDEN)


def test_lambda_begins_as_given_and_learns() -> None:
    for learn in ("scalar", "token"):
        mixer = LocalLinearAttention(HIDDEN, HEADS, learn_lambda=learn, ridge_lambda=0.25)
        if mixer.ridge_proj is not None:
            nn.init.zeros_(mixer.ridge_proj.weight)
        ridge = mixer.ridge(inputs(2, 5, torch.float32))
        assert torch.allclose(ridge, torch.full_like(ridge, 0.25), rtol=1e-5)
        mixer(inputs(2, 5, torch.float32))[0].square().sum().backward()
        assert mixer.ridge_logit.grad.abs().min() > 0
    large = LocalLinearAttention(HIDDEN, HEADS, learn_lambda=None, ridge_lambda=1e8)
    assert large.ridge(inputs(1, 1)).item() == 1e8


def test_a_huge_lambda_is_the_softmax_mixer() -> None:
    softmax = mixers.build("softmax", hidden_size=HIDDEN, num_heads=HEADS, layer_idx=0, num_layers=1, qk_norm=True)
    local = LocalLinearAttention(HIDDEN, HEADS, learn_lambda=None, ridge_lambda=1e10, rope_theta=10000.0)
    local.load_state_dict(softmax.state_dict())
    x = inputs(2, 20, torch.float32)
    close(local(x)[0], softmax(x)[0], 1e-5)


def test_bfloat16_runs_and_learns() -> None:
    mixer = LocalLinearAttention(HIDDEN, HEADS, learn_lambda="token").to(torch.bfloat16)
    y, _, _ = mixer(inputs(2, 9, torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_costs_and_registration() -> None:
    assert mixers.find("local_linear_attention") is LocalLinearAttention
    mixer = make("grouped")
    _, _, cache = mixer(inputs(1, 11), use_cache=True)
    elements = sum(t.numel() for t in cache[1].values())
    assert elements == sum(mixer.state_elements(11).values())
    assert mixer.flops_per_token(100) > 0


def test_wrong_arguments_are_errors() -> None:
    for message, options in (
        ("not a multiple of num_kv_heads = 3", {"num_kv_heads": 3}),
        ("window_size = 0", {"window_size": 0}),
        ("ridge_lambda = -1", {"ridge_lambda": -1.0}),
        ("learn_lambda = 'head'", {"learn_lambda": "head"}),
        ("needed an even number|need an even number", {"head_dim": 5, "rope_theta": 10.0}),
    ):
        with pytest.raises(ValueError, match=message):
            LocalLinearAttention(HIDDEN, HEADS, **options)
    with pytest.raises(ValueError, match="hidden_states has shape"):
        make("plain")(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match="cu_seqlens came with a cache"):
        make("plain")(inputs(1, 4), cu_seqlens=torch.tensor([0, 4]), use_cache=True)


def test_a_language_model_of_it_generates_the_same_with_and_without_cache() -> None:
    from tilewright.nn import HybridConfig, HybridForCausalLM

    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_heads=2, mixer="local_linear_attention"
    )
    model = HybridForCausalLM(config).double().eval()
    prompts = torch.randint(1, 40, (2, 7))
    mask = torch.ones_like(prompts)
    mask[1, :3] = 0
    found = [
        model.generate(
            prompts, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0
        )
        for cached in (True, False)
    ]
    assert torch.equal(*found)
    alone = model.generate(prompts[1:, 3:], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(alone[0, 4:], found[0][1, 7:])
