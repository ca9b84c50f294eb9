# SPDX-License-Identifier: Apache-2.0
"""Every token mixer: one recurrence in all its forms, padding, packed sequences, bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from tilewright.nn import MixerCache, SlidingWindowAttention, mixers
from tilewright.nn.norms import GatedRMSNorm, RMSNorm, SimpleRMSNorm
from tilewright.reference import linear_attention as oracle

HIDDEN, HEADS = 24, 2
CASES = {
    "deltanet": ("deltanet", {}),
    "deltanet-gated-reflecting": ("deltanet", {"use_gate": True, "allow_neg_eigval": True, "expand_v": 1.5}),
    "deltanet-no-conv": ("deltanet", {"use_short_conv": False}),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet-grouped": ("gated_deltanet", {"num_v_heads": 6, "head_dim": 5, "expand_v": 1.2, "use_gate": False}),
    "kda": ("kda", {}),
    "kda-safe": ("kda", {"safe_gate": True, "lower_bound": -5.0, "expand_v": 0.5, "use_short_conv": False}),
    "lightning": ("lightning", {}),
    "lightning-layer-norm": ("lightning", {"norm": "layer", "gate_rank": 3, "slopes": "linear", "head_dim": 5}),
    "lightning-simple": ("lightning", {"norm": "srms", "output_gate": False}),
    "retnet": ("retnet", {}),
    "gla": ("gla", {}),
    "gla-conv": ("gla", {"use_short_conv": True, "gate_rank": 2}),
    "hgrn2": ("hgrn2", {}),
    "hgrn2-conv": ("hgrn2", {"use_short_conv": True, "expand_ratio": 5}),
    "hgrn": ("hgrn", {}),
    "hgrn-conv": ("hgrn", {"use_short_conv": True, "expand_ratio": 1.5}),
    "linear_attention": ("linear_attention", {}),
    "linear_attention-identity": ("linear_attention", {"feature_map": "identity", "use_short_conv": True}),
    "hedgehog": ("hedgehog", {}),
    "hedgehog-conv": ("hedgehog", {"use_short_conv": True, "feature_dim": 5, "bias": True}),
    "softmax": ("softmax", {}),
    "softmax-grouped": ("softmax", {"num_kv_heads": 1, "qk_norm": True, "rope_theta": None}),
    "sliding_window": ("sliding_window", {"window_size": 4}),
}
RECURRENT = [case for case, (name, _) in CASES.items() if name not in ("softmax", "sliding_window")]
# The bound that the study's specification sets for float64; these are a few hundred sums of numbers of order 1.
EXACT = 1e-10


def make(case: str, dtype: torch.dtype = torch.float64, **changes) -> nn.Module:
    name, options = CASES[case]
    place = {"hidden_size": HIDDEN, "num_heads": HEADS, "layer_idx": 1, "num_layers": 3}
    return mixers.build(name, **{**place, **options, **changes}).to(dtype)


def inputs(batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, dtype=dtype)


def options_of(mixer: nn.Module) -> dict[str, Tensor]:
    """A lower bound that is 0 for some gates, for the mixers that have one."""
    if mixer.lower_bound_size is None:
        return {}
    return {"lower_bound": torch.linspace(0, 0.9, mixer.lower_bound_size)}


def close(got: Tensor, need: Tensor, bound: float = EXACT) -> None:
    assert got.shape == need.shape
    assert (got - need).norm() <= bound * need.norm()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_mixers_are_found_by_name():
    assert {name for name, _ in CASES.values()} <= set(mixers.discover())


@pytest.mark.parametrize("cuts", [[9], [1], [3, 4, 5, 6, 7], list(range(1, 14))])
def test_pieces_with_a_cache_equal_the_whole(case, cuts):
    mixer, x = make(case), inputs(2, 14)
    whole, weights, none = mixer(x, **options_of(mixer))
    assert weights is none is None
    cache, pieces = MixerCache(), []
    for piece in torch.tensor_split(x, cuts, dim=1):
        y, _, given = mixer(piece, past_key_values=cache, **options_of(mixer))
        assert given is cache
        pieces.append(y)
    close(torch.cat(pieces, 1), whole)
    assert [cache.get_seq_length(i) for i in (0, 1)] == [0, 14]


def test_single_precision_decodes_as_it_prefills(case):
    """The bound is the specification's; half precision has its own tests with the operators."""
    mixer, x = make(case, torch.float32), inputs(2, 30, torch.float32)
    whole, _, _ = mixer(x, **options_of(mixer))
    _, _, cache = mixer(x[:, :20], use_cache=True, **options_of(mixer))
    steps = [mixer(x[:, t : t + 1], past_key_values=cache, **options_of(mixer))[0] for t in range(20, 30)]
    close(torch.cat(steps, 1), whole[:, 20:], 1e-4)


def by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' functions over the step-by-step oracles of the recurrences, whose gradients are autograd's."""

    def linear(q, k, v, *, output_final_state=False, mode="chunk", **options):
        o, state = oracle.recurrence(q, k, v, **options)
        return o.to(v.dtype), state if output_final_state else None

    def hgrn(x, g, initial_state=None, output_final_state=False, cu_seqlens=None):
        h, state = oracle.hgrn_recurrence(x, g, initial_state=initial_state, cu_seqlens=cu_seqlens)
        return h.to(x.dtype), state if output_final_state else None

    for module in ("delta_rule", "gated_linear_attention", "lightning_attention"):
        monkeypatch.setattr(f"tilewright.ops.{module}.linear_attention", linear)
    monkeypatch.setattr("tilewright.ops.chunk_hgrn", hgrn)
    monkeypatch.setattr("tilewright.ops.fused_recurrent_hgrn", hgrn)


@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
@pytest.mark.parametrize("case", RECURRENT)
def test_equals_the_steps_in_values_gradients_and_states(case, mode, monkeypatch):
    mixer = make(case)
    mixer.mode = mode
    weights, start = inputs(2, 37), inputs(2, 5)

    def run() -> list[Tensor]:
        x, cache = inputs(2, 37).requires_grad_(), MixerCache()
        with torch.no_grad():
            mixer(start, past_key_values=cache, **options_of(mixer))
        mixer.zero_grad()
        y, _, _ = mixer(x, past_key_values=cache, **options_of(mixer))
        (y * weights).sum().backward()
        gradients = [p.grad.clone() for p in mixer.parameters()]
        return [y.detach(), cache[1]["recurrent_state"].detach(), x.grad, *gradients]

    torch.manual_seed(1)
    got = run()
    by_steps(monkeypatch)
    torch.manual_seed(1)
    for ours, need in zip(got, run(), strict=True):
        close(ours, need)
    assert all(tensor.abs().sum() > 0 for tensor in got)


@pytest.mark.parametrize("lengths", [[5, 9], [1, 0, 3, 0], [14], [0, 2]])
def test_packed_equals_each_by_itself(case, lengths):
    mixer, x = make(case), inputs(1, sum(lengths))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed, _, _ = mixer(x, cu_seqlens=bounds, **options_of(mixer))
    for piece, got in zip(x.split(lengths, 1), packed.split(lengths, 1), strict=True):
        if piece.shape[1]:
            close(got, mixer(piece, **options_of(mixer))[0])


def test_left_padding_changes_nothing(case):
    mixer, x = make(case), inputs(3, 12)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :5], mask[2, :11] = 0, 0
    x[mask == 0] = 7.0  # what lies under padding is never read
    y, _, cache = mixer(x, attention_mask=mask, use_cache=True, **options_of(mixer))
    assert not y[mask == 0].any()
    step, longer = inputs(3, 1), torch.cat((mask, torch.ones(3, 1, dtype=torch.int64)), 1)
    z, _, _ = mixer(step, attention_mask=longer, past_key_values=cache, **options_of(mixer))
    for row, first in enumerate((0, 5, 11)):
        alone, _, own = mixer(x[row : row + 1, first:], use_cache=True, **options_of(mixer))
        close(y[row : row + 1, first:], alone)
        close(z[row : row + 1], mixer(step[row : row + 1], past_key_values=own, **options_of(mixer))[0])


# A sliding window counts columns, as its documentation says.
@pytest.mark.parametrize("case", [case for case in CASES if case != "sliding_window"])
def test_padding_on_the_right_leaves_the_state_of_the_last_token(case):
    mixer, x = make(case), inputs(2, 9)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    y, _, cache = mixer(x, attention_mask=mask, use_cache=True, **options_of(mixer))
    alone, _, own = mixer(x[1:, :4], use_cache=True, **options_of(mixer))
    close(y[1:, :4], alone)
    # Positions of the next token are counted without the padding.
    step, positions = inputs(2, 1), torch.tensor([[9], [4]])
    longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
    z, _, _ = mixer(step, longer, past_key_values=cache, position_ids=positions, **options_of(mixer))
    close(z[1:], mixer(step[1:], past_key_values=own, **options_of(mixer))[0])


def test_no_tokens_and_all_padding(case):
    mixer, x = make(case), inputs(2, 6)
    empty, _, cache = mixer(x[:, :0], use_cache=True, **options_of(mixer))
    assert empty.shape == (2, 0, HIDDEN)
    assert cache.get_seq_length(1) == 0
    close(mixer(x, past_key_values=cache, **options_of(mixer))[0], mixer(x, **options_of(mixer))[0])
    mask = torch.zeros(2, 6, dtype=torch.int64)
    assert not mixer(x, attention_mask=mask, **options_of(mixer))[0].any()


def test_nothing_looks_ahead(case):
    mixer, x = make(case), inputs(2, 12)
    before, _, _ = mixer(x, **options_of(mixer))
    x[:, 7:] = 3 * torch.randn_like(x[:, 7:])
    after, _, _ = mixer(x, **options_of(mixer))
    close(after[:, :7], before[:, :7])
    assert (after[:, 7:] != before[:, 7:]).any(-1).all()


def test_not_a_number_stays_in_its_sequence(case):
    mixer, x = make(case), inputs(1, 12)
    bounds = torch.tensor([0, 5, 12])
    before, _, _ = mixer(x, cu_seqlens=bounds, **options_of(mixer))
    x[0, 2] = float("nan")
    after, _, _ = mixer(x, cu_seqlens=bounds, **options_of(mixer))
    close(after[:, 5:], before[:, 5:])
    assert after[0, 2].isnan().all()
    rows, _, _ = mixer(torch.cat((x, torch.nan_to_num(x))), **options_of(mixer))
    assert rows[0].isnan().any()
    assert rows[1].isfinite().all()


def test_bfloat16_runs_and_trains(case):
    mixer, x = make(case, torch.bfloat16), inputs(2, 10, torch.bfloat16)
    y, _, cache = mixer(x, use_cache=True, **options_of(mixer))
    step, _, _ = mixer(x[:, :1], past_key_values=cache, **options_of(mixer))
    assert (y.dtype, step.dtype) == (torch.bfloat16, torch.bfloat16)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    if "recurrent_state" in cache[1]:
        assert cache[1]["recurrent_state"].dtype == torch.float32


def test_autocast_runs_both_forms(case):
    mixer, x = make(case, torch.float32), inputs(2, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        first, _, cache = mixer(x[:, :8], use_cache=True, **options_of(mixer))
        last, _, _ = mixer(x[:, 8:], past_key_values=cache, **options_of(mixer))
        whole, _, _ = mixer(x, **options_of(mixer))
    whole.float().square().sum().backward()
    assert {first.dtype, last.dtype, whole.dtype} == {torch.bfloat16}
    # Each result passes four products of bfloat16 in a row, inputs and outputs rounded: 12 roundings of 2^-9.
    exact, _, _ = mixer(x, **options_of(mixer))
    close(torch.cat((first, last), 1).float(), exact, 12 * 2.0**-9)


def test_size_of_the_state_is_what_the_mixer_says(case):
    mixer = make(case)
    for tokens in (1, 3, 9):
        _, _, cache = mixer(inputs(2, tokens), use_cache=True, **options_of(mixer))
        held = {name: tensor.numel() // 2 for name, tensor in cache[1].items()}
        assert held == mixer.state_elements(tokens)


@pytest.mark.parametrize("window", [1, 3, 256, 400, 700])
def test_windows_equal_the_masked_scores(window):
    """Long enough for several blocks of queries; scores and softmax written out."""
    torch.manual_seed(3)
    tokens, size = 600, 4
    mixer = SlidingWindowAttention(size, 1, window_size=window, rope_theta=None).double()
    x = torch.randn(1, tokens, size, dtype=torch.float64)
    q, k, v = mixer.q_proj(x[0]), mixer.k_proj(x[0]), mixer.v_proj(x[0])
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (distance >= 0) & (distance < window)
    scores = (q @ k.T / size**0.5).masked_fill(~seen, -torch.inf)
    close(mixer(x)[0][0], mixer.o_proj(scores.softmax(-1) @ v))
    mask = torch.ones(1, tokens, dtype=torch.int64)
    mask[0, :290] = 0
    padded, _, _ = mixer(x, attention_mask=mask)
    close(padded[0, 290:], mixer(x[:, 290:])[0][0])


def test_a_window_bounds_the_cache():
    mixer = SlidingWindowAttention(HIDDEN, HEADS, window_size=4)
    _, _, cache = mixer(torch.randn(1, 50, HIDDEN), use_cache=True)
    assert cache[0]["key"].shape[-2] == 3


@pytest.mark.parametrize("norm", [RMSNorm(8), SimpleRMSNorm(8), GatedRMSNorm(8), GatedRMSNorm(8, 1e-5, "sigmoid")])
def test_norms_are_their_equations(norm):
    x, gate = torch.randn(3, 8, dtype=torch.float64) * 5, torch.randn(3, 8, dtype=torch.float64)
    norm = norm.double()
    need = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if isinstance(norm, RMSNorm):
        nn.init.normal_(norm.weight)
        need = need * norm.weight
    if isinstance(norm, GatedRMSNorm):
        opened = torch.sigmoid(gate)
        close(norm(x, gate), need * opened * (gate if norm.activation == "silu" else 1))
    else:
        close(norm(x), need)


BAD = [
    ("deltanet", {"num_heads": 5}, "expand_k \\* hidden_size = 24 is not a multiple of num_heads = 5"),
    ("deltanet", {"hidden_size": 0}, "hidden_size = 0"),
    ("deltanet", {"mode": "fast"}, "'fast'"),
    ("gated_deltanet", {"num_v_heads": 3}, "num_v_heads = 3"),
    ("gated_deltanet", {"head_dim": 257}, "at most 256"),
    ("kda", {"safe_gate": True}, "lower_bound = None"),
    ("kda", {"safe_gate": True, "lower_bound": -6.0}, "lower_bound = -6"),
    ("lightning", {"norm": "batch"}, "'batch'"),
    ("lightning", {"layer_idx": 3}, "layer_idx = 3"),
    ("retnet", {"hidden_size": 6}, "even number"),
    ("gla", {"gate_rank": 0}, "gate_rank = 0"),
    ("hgrn", {"expand_ratio": 0.3}, "expand_ratio"),
    ("linear_attention", {"feature_map": "exp"}, "'exp'"),
    ("linear_attention", {"feature_map": "identity", "normalize": True}, "may be zero"),
    ("hedgehog", {"feature_dim": 129}, "at most 256"),
    ("hedgehog", {"activation": "softmax"}, "'softmax'"),
    ("hedgehog", {"hidden_size": 6, "rope_theta": 10.0}, "even number"),
    ("softmax", {"num_kv_heads": 3}, "num_kv_heads = 3"),
    ("softmax", {"window_size": 0}, "window_size = 0"),
    ("softmax", {"hidden_size": 6}, "even number"),
    ("deltanet", {"head_dims": 4}, "'head_dims' is unknown"),
    ("deltanett", {}, "did you mean deltanet"),
    ("banana", {}, "known: "),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_bad_settings_say_what_is_needed(name, changes, message):
    place = {"hidden_size": HIDDEN, "num_heads": HEADS, "layer_idx": 1, "num_layers": 3}
    with pytest.raises(ValueError, match=message):
        mixers.build(name, **{**place, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"hidden_states": torch.zeros(1, 4, 7)}, r"needed \[B, T, 24\]"),
        ({"hidden_states": torch.zeros(4, HIDDEN)}, "hidden_states has shape"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"needed \[N \+ 1\] and \[1, T, D\]|packed sequences need"),
        ({"attention_mask": torch.ones(2, 3)}, "at least T = 4"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "attention_mask has shape"),
    ],
)
def test_bad_calls_say_what_is_needed(case, call, message):
    with pytest.raises(ValueError, match=message):
        make(case, torch.float32)(**{"hidden_states": torch.zeros(2, 4, HIDDEN), **call})


@pytest.mark.parametrize("extra", [{"use_cache": True}, {"attention_mask": torch.ones(1, 4)}])
def test_packed_sequences_come_alone(case, extra):
    with pytest.raises(ValueError, match="cu_seqlens came with"):
        make(case, torch.float32)(torch.zeros(1, 4, HIDDEN), cu_seqlens=torch.tensor([0, 4]), **extra)


def test_listing_the_mixers_brings_no_optional_package():
    code = "from tilewright.nn import mixers; mixers.discover(); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"transformers", "safetensors", "matplotlib", "scipy"}.isdisjoint(done.stdout.split())
