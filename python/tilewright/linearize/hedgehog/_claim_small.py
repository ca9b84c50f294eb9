# SPDX-License-Identifier: Apache-2.0
"""The small models of Hedgehog's claim: digits in patches (conversion), recall of pairs (from scratch)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.data.recall import IGNORE
from tilewright.linearize.hedgehog.config import HedgehogConfig
from tilewright.linearize.hedgehog.module import FeatureAttention

HEADS, WIDTH = 2, 32
LEARNING_RATES = (1e-3, 3e-3, 1e-2)


class Block(nn.Module):
    """Pre-norm attention and MLP; causal blocks mix each token with the one before it first (a convolution of 2)."""

    def __init__(self, feature_map: str, causal: bool, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.projections, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.shift = nn.Parameter(torch.zeros(3 * width)) if causal else None
        config = HedgehogConfig(feature_map)
        self.attention = FeatureAttention(width // heads, heads, config=config, causal=causal)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.projections(self.norms[0](x))
        if self.shift is not None:
            qkv = qkv + self.shift * F.pad(qkv, (0, 0, 1, -1))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(self.attention(q, k, v)[0].flatten(2))
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


class Digits(nn.Module):
    """A two-layer patch transformer: 8 x 8 pixels as 16 patches of 2 x 2, classes from the mean token."""

    def __init__(self, feature_map: str = "hedgehog", width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.patches, self.places = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(feature_map, False, width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 8, 8] in [0, 1] to logits [B, 10]."""
        cut = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
        x = self.patches(cut) + self.places
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x.mean(1)))
        return logits


class Recall(nn.Module):
    """Two causal blocks over token embeddings, without positions."""

    def __init__(self, feature_map: str, vocabulary: int, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(feature_map, True, width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to logits [B, T, V]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def fit(model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]], steps: int, lr: float) -> None:
    """AdamW with a short warm-up and half a cosine to zero; cross-entropy over the labels that count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        inputs, labels = batches(step)
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of the labels that count which the model ranks first."""
    counted = labels != IGNORE
    return float((model(inputs).argmax(-1) == labels)[counted].float().mean())
