# SPDX-License-Identifier: Apache-2.0
"""Liger as a mixer of a hybrid model: pieces, padding, packed sequences, sizes, generation."""

from __future__ import annotations

import pytest
import torch

from tilewright.linearize.liger.layer import LigerLinearAttention
from tilewright.nn import MixerCache, mixers

FORMS = {
    "gla": {},
    "gla, grouped": {"num_kv_heads": 2, "normalize": True},
    "hgrn2": {"variant": "hgrn2", "pool": 3},
    "gsa": {"variant": "gsa", "pool": 2, "num_kv_heads": 2},
    "no window": {"alpha": 1.0, "beta": 0.0},
}


@pytest.fixture(params=FORMS)
def layer(request):
    torch.manual_seed(5)
    made = mixers.build(
        "liger", hidden_size=24, num_heads=4, layer_idx=1, num_layers=2, window_size=5, **FORMS[request.param]
    )
    assert isinstance(made, LigerLinearAttention)
    return made.double()


def tokens(*shape):
    return torch.randn(*shape, 24, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[1] * 13, [5, 1, 7], [12, 1]])
def test_pieces_with_a_cache_equal_one_call(layer, sizes):
    x, cache = tokens(2, 13), MixerCache()
    want = layer(x)[0]
    got = torch.cat([layer(part, past_key_values=cache)[0] for part in x.split(sizes, 1)], 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert cache.get_seq_length(1) == 13
    assert {name: t[0].numel() for name, t in cache[1].items()} == layer.state_elements(13)


def test_padding_anywhere_changes_no_token(layer):
    x = tokens(3, 14)
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[0, :6], mask[1, 9:], mask[2, 4:7] = 0, 0, 0
    cache = MixerCache()
    places = mask.cumsum(1).sub(1).clamp_min(0)
    out = layer(x, attention_mask=mask, past_key_values=cache, position_ids=places)[0]
    more = layer(x[:, :1], past_key_values=cache, position_ids=mask.sum(1, keepdim=True))[0]
    assert not out[mask == 0].any()
    for row, keep, made, last in zip(x, mask.bool(), out, more, strict=True):
        alone = layer(torch.cat([row[keep], row[:1]])[None])[0][0]
        torch.testing.assert_close(torch.cat([made[keep], last]), alone, rtol=0, atol=1e-12)


def test_packed_sequences_equal_rows_of_their_own(layer):
    x, ends = tokens(1, 20).requires_grad_(), torch.tensor([0, 7, 7, 8, 20])
    out = layer(x, cu_seqlens=ends)[0]
    want = torch.cat([layer(part)[0] for part in x.split(ends.diff().tolist(), 1)], 1)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    probe = torch.randn_like(out)
    got, need = (torch.autograd.grad((y * probe).sum(), x)[0] for y in (out, want))
    torch.testing.assert_close(got, need, rtol=0, atol=1e-12)


def test_chunked_and_recurrent_forms_agree(layer):
    x = tokens(1, 40)
    want = layer(x)[0]
    layer.mode = "recurrent"
    torch.testing.assert_close(layer(x)[0], want, rtol=0, atol=1e-12)


def test_no_token(layer):
    assert layer(tokens(2, 0))[0].shape == (2, 0, 24)


def test_work_is_that_of_the_window_and_the_states():
    layer = LigerLinearAttention(24, 4, num_kv_heads=2, window_size=3)
    # 4 tokens see 1, 2, 3 and 3 keys
    assert layer.flops_per_token(4) == 3 * 2 * 36 + 2 * 4 * 36 + 4 * 4 * 6 * 9 / 4


def test_a_hybrid_model_generates_with_it():
    from tilewright.nn import HybridConfig, HybridForCausalLM

    pattern = [{"mixer": "liger", "window_size": 4}, "softmax"]
    config = HybridConfig(vocab_size=31, hidden_size=24, num_hidden_layers=2, num_heads=4, pattern=pattern)
    model = HybridForCausalLM(config).eval()
    ids = torch.randint(0, 31, (2, 9))
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads = 3"),
        ({"pool": 4}, "pool = 4"),
        ({"window_size": 0}, "window_size=0"),
        ({"hidden_size": 20}, "heads of 5"),
        ({"surprise": 1}, "'surprise' is unknown"),
    ],
)
def test_bad_options_are_named(options, what):
    with pytest.raises(ValueError, match=what):
        mixers.build("liger", **{"hidden_size": 24, "num_heads": 4, "layer_idx": 0, "num_layers": 1} | options)
