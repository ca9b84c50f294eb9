# SPDX-License-Identifier: Apache-2.0
"""Whole models: imported from transformers, the same tokens on Python reference and HLS."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edge_inputs import POINTS

from tilewright.edge import EdgeModel
from tilewright.edge.hls import HlsUnits
from tilewright.edge.model import ternary_of


def llama(**changes: object):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    values = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 41, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(values | changes))).eval()


def ternarised(module: torch.nn.Module) -> torch.nn.Module:
    """Decoder linears in float with their ternary values, and the quantizer in front of them."""

    def quantizing(layer: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        s = inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return ((inputs[0] * 127 / s).round() * s / 127,)

    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and name != "lm_head":
            codes, gamma = ternary_of(part.weight)
            part.weight.data = torch.from_numpy(codes).float() * gamma
            part.register_forward_pre_hook(quantizing)
    return module


def test_a_transformers_model_computes_nearly_the_same() -> None:
    """Norms, permuted rotation, grouped heads, gate and head are where transformers has them."""
    module = ternarised(llama())
    tokens = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        true = module(tokens).logits[0].numpy()
    session = EdgeModel.from_transformers(module, POINTS[1]).session(capacity=12)
    got = session.logits(session.hidden(tokens[0].tolist()))
    assert np.abs(got - true).max() < 0.05 * np.abs(true).max()
    assert session.status.value == 0


def test_python_and_hls_generate_the_same_tokens() -> None:
    edge = EdgeModel.from_transformers(llama(), POINTS[1])
    prompt = list(range(3, 20))
    python = edge.session(capacity=60).generate(prompt, 32)
    assert python == edge.session(HlsUnits(POINTS[1]), 60).generate(prompt, 32)
    assert len(set(python)) > 2


def test_a_weight_that_is_ternary_keeps_its_scale() -> None:
    codes, gamma = ternary_of(torch.tensor([[0.5, 0.0, -0.5], [0.0, 0.0, 0.5]]))
    assert codes.tolist() == [[1, 0, -1], [0, 0, 1]]
    assert gamma == 0.5
    with pytest.raises(ValueError, match="NaN"):
        ternary_of(torch.tensor([[float("nan"), 1.0]]))


def test_what_the_accelerator_cannot_compute_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        EdgeModel.from_transformers(llama(attention_bias=True))
    with pytest.raises(ValueError, match="hidden_act"):
        EdgeModel.from_transformers(llama(hidden_act="gelu"))
    edge = EdgeModel.from_transformers(llama(), POINTS[1])
    with pytest.raises(ValueError, match="ids below 61"):
        edge.session().hidden([61])
    with pytest.raises(ValueError, match="capacity"):
        edge.session(capacity=5000)


def test_packed_layers_are_taken_as_they_are() -> None:
    from tilewright.formats import pack_ternary

    module, plain = llama(), llama()
    linears = [part for part in module.modules() if isinstance(part, torch.nn.Linear) and part is not module.lm_head]
    for part in linears:
        codes, gamma = ternary_of(part.weight)
        part.ternary = lambda c=codes, g=gamma: pack_ternary(torch.from_numpy(c), "t5", scale=g)
        part.weight.data.zero_()
    tokens = [5, 9, 2, 7]
    got, true = (
        EdgeModel.from_transformers(one, POINTS[1]).session(capacity=4).hidden(tokens) for one in (module, plain)
    )
    assert np.array_equal(got, true)
    linears[0].ternary = lambda: pack_ternary(torch.ones(32, 24, dtype=torch.int8), "t5", scale=torch.ones(32))
    with pytest.raises(ValueError, match="32 weight scales"):
        EdgeModel.from_transformers(module, POINTS[1])
