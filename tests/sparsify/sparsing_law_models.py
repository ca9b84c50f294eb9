# SPDX-License-Identifier: Apache-2.0
"""Tiny language models with feed-forward blocks of every kind, small enough to check by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, NEURONS = 24, 16, 40


class GatedBlock(nn.Module):
    def __init__(self, act: nn.Module, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, NEURONS, bias=bias) for _ in range(2))
        self.act_fn = act
        self.down_proj = nn.Linear(NEURONS, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PlainBlock(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, NEURONS), act, nn.Linear(NEURONS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TinyModel(nn.Module):
    """Embedding, residual blocks without any mixing of positions, head: [B, T] to logits [B, T, V]."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # noqa: ARG002
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def tiny(kind: str = "silu", seed: int = 0, layers: int = 2) -> TinyModel:
    """``silu``, ``relu``: gated; ``plain``: without a gate, ReLU."""
    torch.manual_seed(seed)
    acts = {"silu": nn.SiLU, "relu": nn.ReLU}
    blocks = [PlainBlock(nn.ReLU()) if kind == "plain" else GatedBlock(acts[kind](), bias=True) for _ in range(layers)]
    model = TinyModel(*blocks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval().requires_grad_(False)


def learned(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A batch whose labels are what the model itself finds likeliest, so that any change costs perplexity."""
    return {"input_ids": x, "labels": torch.cat([x[:, :1], model(x).argmax(-1)[:, :-1]], 1)}


def text(batch: int = 3, length: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
