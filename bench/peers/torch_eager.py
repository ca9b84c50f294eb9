# SPDX-License-Identifier: Apache-2.0
"""torch on the dequantized weights: `F.linear` for operators, transformers for whole models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from bench.timing import copies_beyond_cache
from tilewright.measure.launch import Method, why_absent

FORMS = {"torch float32": "float32", "torch bfloat16": "bfloat16"}


def available() -> str | None:
    """Why transformers models cannot be measured here, or None."""
    return why_absent("torch")


def methods(gguf: Path) -> dict[str, Method]:
    """transformers in float32 and bfloat16."""
    return {name: Method("torch", str(gguf), {"dtype": form}) for name, form in FORMS.items()}


def linears(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[int], torch.Tensor]]:
    """`F.linear` of x [M, K] and weight [N, K] in each form, over rotating copies of the weight."""
    works: dict[str, Callable[[int], torch.Tensor]] = {}
    for name, form in FORMS.items():
        dtype = getattr(torch, form)
        count = copies_beyond_cache(weight.numel() * dtype.itemsize)
        copies = [weight.to(dtype, copy=True) for _ in range(count)]
        works[name] = partial(lambda x, copies, i: linear(x, copies[i % len(copies)]), x.to(dtype), copies)
    return works
