# SPDX-License-Identifier: Apache-2.0
"""Small random models in the formats that the engine runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.formats import Int4Weight, quantize_int4
from tilewright.formats.int8 import GROUP, Int8Weight
from tilewright.models import LanguageModel, LlamaConfig
from tilewright.models.language_model import Weight, expected_shapes, linear_names

VOCABULARY = 101


def engine_config(**changes: Any) -> LlamaConfig:
    """Two layers, width 64, four query and two key heads of 16, a vocabulary that fills no block."""
    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "eos_token_ids": (2,),
    }
    return LlamaConfig(**(values | changes))


def int8_weight(values: Tensor) -> Int8Weight:
    """Round a float matrix to Q8_0's grid."""
    groups = values.unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 127).to(torch.float16)
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales).float().unsqueeze(-1)
    return Int8Weight((groups / divisor).round().clamp(-127, 127).to(torch.int8).flatten(1), scales)


def engine_model(
    seed: int = 0,
    *,
    group: int = 32,
    symmetric: bool = True,
    head: str = "int8",
    key_scale: bool = False,
    **changes: Any,
) -> LanguageModel:
    """INT4 linears; embedding (and a head of its own) as `head` says: "int8", "int4" or "bf16"."""
    config = engine_config(**changes)
    generator = torch.Generator().manual_seed(seed)
    linears = set(linear_names(config))
    weights: dict[str, Weight] = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator) * 0.15
        if "norm" in name:
            weights[name] = values + 1
        elif name in linears:
            weights[name] = quantize_int4(values, group, torch.float16, symmetric=symmetric)
        elif len(shape) == 2:
            weights[name] = _head(values * 5, head, group)
        else:
            weights[name] = values
    if key_scale:
        for index in range(config.num_hidden_layers):
            values = torch.rand((config.num_key_value_heads, config.head_dim), generator=generator) + 0.5
            weights[f"model.layers.{index}.self_attn.key_scale"] = values
    return LanguageModel(config, weights, source="small")


def _head(values: Tensor, kind: str, group: int) -> Weight:
    if kind == "int8":
        return int8_weight(values)
    return quantize_int4(values, group, torch.float16) if kind == "int4" else values.to(torch.bfloat16)


def token_ids(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def dense(weight: Weight) -> Tensor:
    """float64."""
    if isinstance(weight, Int4Weight):
        return weight.dequantize(torch.float64)
    return weight.dequantize().double() if isinstance(weight, Int8Weight) else weight.double()
