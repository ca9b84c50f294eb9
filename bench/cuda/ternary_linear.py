# SPDX-License-Identifier: Apache-2.0
"""Ternary weights times INT8 activations at the shapes of BitNet models, weights coming from device memory."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.cuda.cases import GpuCase, Methods
from tilewright import ops
from tilewright.formats import PackedTernary, pack_ternary

SHAPES = ((13824, 2560), (2560, 6912), (20480, 3200), (2560, 2560))
TOKENS = (1, 8, 512, 32, 2, 128, 2048)
ROTATED_BYTES = 200e6
"""Weights that take turns: four times the last-level cache."""
LEAST_INT_MM_TOKENS = 17


def copies(bytes_of_one: int) -> int:
    return math.ceil(ROTATED_BYTES / bytes_of_one)


def turns(one: Callable[[Any], Any], weights: list[Any]) -> Callable[[], Any]:
    """A call that takes the next weight each time."""
    order = itertools.cycle(weights)
    return lambda: one(next(order))


def clones(packed: PackedTernary) -> list[PackedTernary]:
    """As many weights as a cache cannot hold; equal ones, which no kernel can tell."""
    count = copies(packed.data.numel())
    return [PackedTernary(packed.data.clone(), packed.shape, packed.format, packed.scale) for _ in range(count)]


@dataclass(frozen=True)
class Weights:
    """One matrix in every form that is compared, as often as a cache cannot hold it."""

    packed: list[PackedTernary]
    bfloat16: list[torch.Tensor]
    int8: list[torch.Tensor]


@functools.lru_cache(maxsize=1)
def weights(rows: int, columns: int) -> Weights:
    values = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    packed, narrow = pack_ternary(values, "mma2", scale=0.02).to("cuda"), values.cuda()
    wide = narrow.to(torch.bfloat16)
    return Weights(
        clones(packed),
        [wide.clone() for _ in range(copies(wide.numel() * 2))],
        [narrow.clone() for _ in range(copies(narrow.numel()))],
    )


def methods(tokens: int, rows: int, columns: int) -> Methods:
    w = weights(rows, columns)
    codes = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, device="cuda")
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    found: Methods = {
        "tilewright": turns(lambda packed: ops.ternary_matmul(codes, packed), w.packed),
        "tilewright linear": turns(lambda packed: ops.ternary_linear(x, packed), w.packed),
        "torch bf16": turns(lambda wide: x @ wide.T, w.bfloat16),
    }
    if tokens >= LEAST_INT_MM_TOKENS:
        found["torch _int_mm"] = turns(lambda narrow: torch._int_mm(codes, narrow.T), w.int8)
    return found


def cases() -> list[GpuCase]:
    return [
        GpuCase(
            name=f"ternary_linear-{rows}x{columns}-m{tokens}",
            make=lambda t=tokens, n=rows, k=columns: methods(t, n, k),
            bytes=rows * columns // 4 + tokens * columns + 4 * tokens * rows,
            operations=2.0 * tokens * rows * columns,
            peak="int8",
            calls=copies(rows * columns // 4),
            note="int8 to int32; `linear` is bfloat16 to bfloat16, rounding of the activations included",
        )
        for rows, columns in SHAPES
        for tokens in TOKENS
    ]
