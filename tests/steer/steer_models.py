# SPDX-License-Identifier: Apache-2.0
"""Small models and texts for the tests of steering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def tiny_llama(seed: int = 0, layers: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    """Width 32, random weights, uneven norms."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in name:
                parameter.normal_()
    return model.to(dtype)


def texts(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    """Token ids in [low, high), 1 to 7 a text."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (count,), generator=random).tolist()
    return [torch.randint(low, high, (n,), generator=random).tolist() for n in lengths]


def source(count: int = 12) -> list[list[int]]:
    return texts(count, 1, 25, seed=1)


def target(count: int = 12) -> list[list[int]]:
    return texts(count, 20, 60, seed=2)


class OnePlace(nn.Module):
    """Each text is one row of a table, passed through one place."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(rows, freeze=True)
        self.place = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        del attention_mask
        return self.place(self.table(input_ids))


def one_place(z: Tensor, v: Tensor) -> tuple[OnePlace, list[list[int]], list[list[int]]]:
    """Model, source and target texts whose pooled activations are the rows of z and v."""
    return OnePlace(torch.cat([z, v])), [[i] for i in range(len(z))], [[len(z) + i] for i in range(len(v))]
