# SPDX-License-Identifier: Apache-2.0
"""Local linear attention on a CUDA device: beside the same iterations in torch, and beside softmax attention.

The published Triton kernels are not packaged. `torch` is the method with all weights kept, `[H, T, T]` in 16 bits, and
as many iterations as the slowest row of `tilewright` needs; `torch softmax` is one scaled_dot_product_attention, the
unit of cost of a pass: an iteration has three products of that size where softmax attention has two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cuda.cases import GpuCase, Methods

ITERATIONS = {0.1: 4, 1.0: 2, 10.0: 2}
"""What queries and keys of length 1 need at each ridge, for the counts of operations."""


def _inputs(tokens: int, keys: int, heads: int, size: int, copies: int = 1) -> list[tuple[Tensor, Tensor, Tensor]]:
    def unit(count: int) -> Tensor:
        x = torch.randn(1, count, heads, size, device="cuda")
        return (x / x.norm(dim=-1, keepdim=True)).bfloat16()

    return [
        (unit(tokens), unit(keys), torch.randn(1, keys, heads, size, device="cuda").bfloat16()) for _ in range(copies)
    ]


def _torch_form(q: Tensor, k: Tensor, v: Tensor, ridge: float, iterations: int) -> Tensor:
    """Causal, `[H, T, K]`: statistics, conjugate gradients and output as matrix products over kept weights."""
    tokens, size = q.shape[1:]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    p = (q @ k.mT).float().mul_(size**-0.5).masked_fill_(hidden, -torch.inf).softmax(-1).to(q.dtype)
    mean = (p @ k).float()
    left = mean - q.float()
    x, direction, square = torch.zeros_like(left), left.clone(), left.square().sum(-1, keepdim=True)
    for _ in range(iterations):
        rounded = direction.to(q.dtype)
        along = (rounded @ k.mT).float() - (mean * direction).sum(-1, keepdim=True)
        image = ((p * along).to(q.dtype) @ k).float() + ridge * direction
        step = square / (direction * image).sum(-1, keepdim=True).clamp_min(1e-30)
        x += step * direction
        left -= step * image
        fresh = left.square().sum(-1, keepdim=True)
        direction = left + fresh / square.clamp_min(1e-30) * direction
        square = fresh
    tilt = 1 + (mean * x).sum(-1, keepdim=True) - (x.to(q.dtype) @ k.mT).float()
    return (p * tilt).to(q.dtype) @ v


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return q, k, v


def _forward(size: int, ridge: float) -> Callable[[], Methods]:
    def make() -> Methods:
        from tilewright.ops import lla_attention

        q, k, v = _inputs(4096, 4096, 16, size)[0]
        _, stats = lla_attention(q, k, v, ridge_lambda=ridge, return_stats=True)
        iterations = int(stats["iters"].max())
        first = _heads_first(q, k, v)
        flat = (first[0][0], first[1][0], first[2][0])
        attention = torch.nn.functional.scaled_dot_product_attention
        methods: Methods = {
            "tilewright": lambda: lla_attention(q, k, v, ridge_lambda=ridge, solver="cg"),
            "torch softmax": lambda: attention(*first, is_causal=True),
        }
        if ridge == 1.0:
            methods[f"torch, {iterations} iterations"] = lambda: _torch_form(*flat, ridge, iterations)
        return methods

    return make


def _both(tokens: int, size: int, ridge: float) -> Callable[[], Methods]:
    def make() -> Methods:
        from tilewright.ops import lla_attention

        q, k, v = (x.requires_grad_() for x in _inputs(tokens, tokens, 16, size)[0])
        first = tuple(x.detach().requires_grad_() for x in _heads_first(q, k, v))
        weight = torch.randn(1, tokens, 16, size, device="cuda", dtype=torch.bfloat16)
        attention = torch.nn.functional.scaled_dot_product_attention

        def ours() -> Any:
            return torch.autograd.grad(lla_attention(q, k, v, ridge_lambda=ridge, solver="cg"), (q, k, v), weight)

        def softmax() -> Any:
            return torch.autograd.grad(
                attention(first[0], first[1], first[2], is_causal=True), first, weight.transpose(1, 2)
            )

        return {"tilewright": ours, "torch softmax": softmax}

    return make


def _decode(length: int, heads: int, size: int, ridge: float) -> Callable[[], Methods]:
    def make() -> Methods:
        from tilewright.ops import lla_decode

        copies = _inputs(1, length, heads, size, copies=4)
        lengths = torch.tensor([length], device="cuda")
        first = [_heads_first(*x) for x in copies]
        turn = {"ours": 0, "softmax": 0}
        attention = torch.nn.functional.scaled_dot_product_attention

        def ours() -> Any:
            turn["ours"] += 1
            return lla_decode(*copies[turn["ours"] % 4], lengths, ridge_lambda=ridge, solver="cg")

        def softmax() -> Any:
            turn["softmax"] += 1
            return attention(*first[turn["softmax"] % 4])

        return {"tilewright": ours, "torch softmax": softmax}

    return make


def cases() -> list[GpuCase]:
    found = []
    tokens, heads = 4096, 16
    for size in (64, 128):
        pairs = heads * tokens * (tokens + 1) / 2
        traffic = 2 * 4 * heads * tokens * size + 4 * heads * tokens * size
        for ridge in (0.1, 1.0):
            count = ITERATIONS[ridge]
            products = 2 + 3 * count + 3
            found.append(
                GpuCase(
                    name=f"lla_attention H={heads} T={tokens} D={size} lambda={ridge}",
                    make=_forward(size, ridge),
                    bytes=traffic,
                    operations=2 * pairs * size * products,
                    note=f"counted with {count} iterations",
                )
            )
        found.append(
            GpuCase(
                name=f"lla_attention forward and backward H={heads} T={tokens} D={size} lambda=1.0",
                make=_both(tokens, size, 1.0),
                bytes=3 * traffic,
                operations=2 * pairs * size * (2 + 3 * 2 + 3 + 2 + 2 + 3 * 2 + 5 + 8),
                calls=2,
                note="counted with 2 iterations each way",
            )
        )
        length = 16384
        found.append(
            GpuCase(
                name=f"lla_decode H={heads} L={length} D={size} lambda=1.0",
                make=_decode(length, heads, size, 1.0),
                bytes=2 * heads * length * size * (2 + ITERATIONS[1.0] + 2),
                operations=2 * heads * length * size * (2 + 2 * ITERATIONS[1.0] + 3),
                note="keys read once for the weights, once an iteration and once with the values",
            )
        )
    return found
