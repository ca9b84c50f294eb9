# SPDX-License-Identifier: Apache-2.0
"""Small random transformers models with gated MLPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 50


def small_model(family: str = "llama", **changes: Any) -> Any:
    """Two layers of width 32 with MLPs of 48 neurons."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(values | changes))).eval()


def batches(count: int = 4, length: int = 32, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (2, length), generator=generator) for _ in range(count)]


class PlainMLP(nn.Module):
    """Two layers, no gate."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})
