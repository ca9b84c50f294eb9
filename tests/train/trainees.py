# SPDX-License-Identifier: Apache-2.0
"""Models small enough to train in a second."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright import ops
from tilewright.ops.sequence import piece

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


class SequenceModel(nn.Module):
    """A language model with one of each: short convolution, gated delta rule, element-wise recurrence, softmax."""

    def __init__(self, *, width: int = 12, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.blocks = nn.ModuleList(kind(width) for kind in (DeltaBlock, HgrnBlock, SoftmaxBlock))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight._no_weight_decay = True

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embedding(inputs)
        for block in self.blocks:
            x = x + block(F.layer_norm(x, x.shape[-1:]))
        return self.head(self.norm(x))


class DeltaBlock(nn.Module):
    def __init__(self, width: int, heads: int = 2, conv_size: int = 4) -> None:
        super().__init__()
        self.heads, self.conv_size = heads, conv_size
        self.projection = nn.Linear(width, 3 * width + 2 * heads)
        self.conv = nn.Conv1d(3 * width, 3 * width, conv_size, groups=3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv, gates = self.projection(x).split([3 * x.shape[-1], 2 * self.heads], -1)
        here, past = piece(), self.conv_size - 1
        before = qkv.new_zeros(qkv.shape[0], past, qkv.shape[2]) if here is None else here.before(qkv, past)
        qkv = F.silu(self.conv(torch.cat([before, qkv], 1).transpose(1, 2))).transpose(1, 2)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in qkv.chunk(3, -1))
        beta, g = gates.chunk(2, -1)
        o, _ = ops.chunk_gated_delta_rule(q, k, v, F.logsigmoid(g), torch.sigmoid(beta), use_qk_l2norm_in_kernel=True)
        return self.out(o.flatten(2))


class HgrnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.projection(x).chunk(2, -1)
        return ops.chunk_hgrn(value, F.logsigmoid(gate))[0]


class SoftmaxBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(x).chunk(3, -1)
        if (here := piece()) is not None:
            k, v = here.until_here(k), here.until_here(v)
        first = k.shape[1] - q.shape[1]
        seen = torch.arange(k.shape[1]) <= first + torch.arange(q.shape[1])[:, None]
        weights = (q @ k.transpose(1, 2) / k.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        return weights @ v
