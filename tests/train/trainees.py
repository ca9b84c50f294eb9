# SPDX-License-Identifier: Apache-2.0
"""Models small enough to train in a second."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 16


class TinyModel(nn.Module):
    """Embedding, blocks of a causal mean and an MLP, output: a language model with a buffer and a dropout."""

    def __init__(self, *, width: int = 8, depth: int = 2, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)) for _ in range(depth)
            )
            self.norm = nn.LayerNorm(width)
            self.decay = nn.Parameter(torch.zeros(width, 1))
            self.decay._no_weight_decay = True
            self.head = nn.Linear(width, VOCABULARY, bias=False)
            self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embedding(inputs)
        if self.training:
            self.calls += 1
        for block in self.blocks:
            past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
            x = x + self.dropout(block(past * torch.sigmoid(self.decay[:, 0])))
        return self.head(self.norm(x))


def hybrid(seed: int = 0) -> nn.Module:
    """A language model with one of each: delta rule with short convolution, element-wise recurrence, softmax, decay."""
    from tilewright.nn import HybridConfig, HybridForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = HybridConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=4,
            num_heads=2,
            pattern=["gated_deltanet", "hgrn", "softmax", "retnet"],
            initializer_range=0.2,
        )
        model = HybridForCausalLM(config)
    model.lm_head.weight._no_weight_decay = True
    return model
