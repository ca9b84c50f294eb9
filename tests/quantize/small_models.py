# SPDX-License-Identifier: Apache-2.0
"""Small random language models with the two things that make low bits hard: uneven columns and large keys."""

from __future__ import annotations

from typing import Any

import torch

from tilewright.models import LanguageModel, LlamaConfig
from tilewright.models.language_model import expected_shapes


def small_config(**changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 80,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**(values | changes))


def small_model(seed: int = 0, **changes: Any) -> LanguageModel:
    config = small_config(**changes)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator) * 0.2
        if "norm" in name:
            values = values + 1
        elif len(shape) == 2 and "layers" in name:
            values = values * torch.exp(torch.randn(shape[1], generator=generator))
        if "k_proj.weight" in name:
            values[3::8] *= 12
        weights[name] = values
    return LanguageModel(config, weights, source="small")


def tokens(batch: int = 2, length: int = 24, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 80, (batch, length), generator=torch.Generator().manual_seed(seed))
