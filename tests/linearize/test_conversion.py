# SPDX-License-Identifier: Apache-2.0
"""Which layers are replaced, what is kept of them, and what is refused."""

from __future__ import annotations

import pytest
import torch
from converted_models import TYPES, tiny_model
from torch import nn

from tilewright import linearize
from tilewright.linearize.attention import base_attention, real_tokens
from tilewright.linearize.cache import StateLayer, state_layer
from tilewright.linearize.conversion import converted_layers
from tilewright.linearize.liger import LigerAttention, LigerConfig, convert_to_liger


def test_layers_to_convert():
    chosen = linearize.layers_to_convert
    assert chosen(4) == (0, 1, 2, 3)
    assert chosen(4, [3, 0]) == (0, 3)
    assert chosen(4, [-1]) == (3,)
    assert chosen(30, keep_every=8) == tuple(i for i in range(30) if i not in (7, 15, 23))
    assert chosen(4, keep=[1, 2]) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"layers": [4]}, "layers holds 4"),
        ({"layers": [True]}, "layers holds True"),
        ({"layers": [1, -3]}, "layer 1 twice"),
        ({"layers": "some"}, "'some'"),
        ({"keep": [0, 1, 2, 3]}, "no layer is left"),
        ({"keep_every": 1}, "keep_every = 1"),
    ],
)
def test_wrong_layers_are_named(arguments, what):
    with pytest.raises(ValueError, match=what):
        linearize.layers_to_convert(4, **arguments)


@pytest.mark.parametrize("kind", TYPES)
def test_parameters_keep_their_names_and_values(kind):
    base = tiny_model(kind)
    model = convert_to_liger(base, softmax_layers=[1])
    before, after = dict(base.named_parameters()), dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(converted_layers(model)) == [0, 2]
    assert linearize.linearization(base) is None
    assert converted_layers(base) == {}
    assert all(p.data_ptr() != before[name].data_ptr() for name, p in after.items())


def test_in_place_changes_the_model_itself():
    base = tiny_model()
    assert convert_to_liger(base, inplace=True, layers=[0]) is base
    assert linearize.linearization(base) == linearize.Linearization("liger", LigerConfig(), (0,))


@pytest.mark.parametrize("kind", TYPES)
def test_projections_are_those_of_the_base_layer(kind):
    """Biases (Qwen2) and per-head norms (Qwen3) included: only softmax over a wide window is left to differ."""
    base = tiny_model(kind, attention_bias=True) if kind in ("Llama", "Qwen3") else tiny_model(kind)
    model = convert_to_liger(base, alpha=0.0, beta=1.0, window_size=512)
    ids = torch.randint(3, 97, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=2e-6)


def test_unknown_attention_is_named():
    class OddAttention(nn.Module):
        pass

    base = tiny_model()
    base.model.layers[1].self_attn = OddAttention()
    with pytest.raises(ValueError, match="OddAttention"):
        convert_to_liger(base, inplace=True)
    assert converted_layers(base) == {}
    with pytest.raises(ValueError, match=r"Linear has no model\.layers"):
        linearize.convert(nn.Linear(2, 2), "liger")
    with pytest.raises(ValueError, match="'gemma'"):
        base_attention(type("C", (), {"model_type": "gemma"})(), 0)


def test_a_model_is_converted_once():
    model = convert_to_liger(tiny_model(), layers=[0])
    with pytest.raises(ValueError, match="already linearized"):
        convert_to_liger(model)
    with pytest.raises(ValueError, match="did you mean liger"):
        linearize.convert(tiny_model(), "ligr")


def test_mask_of_real_tokens():
    row = torch.tensor([[0, 1, 1, 1]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril()[None, None] & row.bool()[:, None, None]
    assert real_tokens(causal, 4).tolist() == [[False, True, True, True]]
    assert real_tokens(causal[:, :, 2:], 2) is None
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert real_tokens(additive, 4).tolist() == [[False, True, True, True]]
    assert real_tokens(row, 4).tolist() == [[False, True, True, True]]
    assert real_tokens(row, 2) is None
    assert real_tokens(None, 3) is None
    with pytest.raises(ValueError, match=r"shape \[2, 3, 4\]"):
        real_tokens(torch.ones(2, 3, 4), 4)


def test_texts_packed_in_one_row_are_refused():
    layer = convert_to_liger(tiny_model()).model.layers[0].self_attn
    with pytest.raises(ValueError, match="row of its own"):
        layer(
            torch.zeros(1, 4, 48),
            (torch.ones(1, 4, 16), torch.zeros(1, 4, 16)),
            position_ids=torch.tensor([[0, 1, 0, 1]]),
        )
    with pytest.raises(ValueError, match="position_embeddings"):
        layer(torch.zeros(1, 4, 48))


def test_caches_that_do_not_fit_are_refused():
    from transformers import StaticCache

    base, model = tiny_model(), convert_to_liger(tiny_model())
    cache = base(torch.tensor([[5, 6]]), use_cache=True)
    filled = getattr(cache, "cache", None) or cache.past_key_values
    with pytest.raises(ValueError, match="already holds keys"):
        state_layer(filled, 0)
    with pytest.raises(TypeError, match="StaticLayer"):
        state_layer(StaticCache(config=model.config, max_cache_len=8), 0)
    with pytest.raises(TypeError, match="cache is a dict"):
        state_layer({}, 0)
    with pytest.raises(TypeError, match="softmax attention asked"):
        StateLayer().update()
    with pytest.raises(ValueError, match="cannot give tokens back"):
        StateLayer().crop(-1)


def test_a_layer_can_be_made_from_a_configuration():
    layer = LigerAttention(tiny_model("Qwen3").config, 1, variant="gsa", pool=4)
    assert layer.layer_idx == 1
    assert layer.q_norm is not None
    assert layer.liger == LigerConfig(variant="gsa", pool=4)
