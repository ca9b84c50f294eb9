# SPDX-License-Identifier: Apache-2.0
"""Random calls of linear_attention for the device's tests, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

RULES = ("additive", "delta")
DECAYS = ("none", "head", "token", "channel")
CHUNK = 64


@dataclass(frozen=True)
class Inputs:
    """One call and, where it is wanted, what its gradient starts from; on the CPU."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    g: Tensor | None
    initial_state: Tensor | None
    rule: Any
    cu_seqlens: Tensor | None = None
    d_out: Tensor | None = None
    d_state: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same call with every tensor changed."""
        changed: dict[str, Any] = {
            f.name: function(x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)
        }
        return replace(self, **changed)

    def to(self, dtype: torch.dtype) -> Inputs:
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def leaves(self) -> dict[str, Tensor]:
        found = {n: getattr(self, n) for n in ("q", "k", "v", "beta", "g", "initial_state")}
        return {name: x for name, x in found.items() if x is not None}


def make(
    rule: str,
    decay: str,
    tokens: int,
    *,
    batch: int = 1,
    heads: int = 1,
    group: int = 1,
    key: int = 64,
    value: int = 64,
    strength: float = 1.0,
    offsets: list[int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Inputs:
    """Random inputs with keys of unit length, beta in (0, 1) and log decays in (-strength, 0)."""
    rng = torch.Generator().manual_seed(seed)
    value_heads = heads * group
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=wide)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=wide)

    gates = {
        "none": lambda: None,
        "head": lambda: -strength * uniform(value_heads),
        "token": lambda: -strength * uniform(batch, tokens, value_heads),
        "channel": lambda: -strength * uniform(batch, tokens, value_heads, key),
    }
    sequences = batch if offsets is None else len(offsets) - 1
    return Inputs(
        q=normal(batch, tokens, heads, key).to(dtype),
        k=torch.nn.functional.normalize(normal(batch, tokens, heads, key), dim=-1).to(dtype),
        v=normal(batch, tokens, value_heads, value).to(dtype),
        beta=uniform(batch, tokens, value_heads) if rule == "delta" else None,
        g=gates[decay](),
        initial_state=normal(sequences, value_heads, key, value),
        d_out=normal(batch, tokens, value_heads, value).to(dtype),
        d_state=normal(sequences, value_heads, key, value),
        rule=rule,
        cu_seqlens=None if offsets is None else torch.tensor(offsets),
    )


def relative(got: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """||got - wanted|| / max(||wanted||, floor); 0 for empty tensors."""
    error = (got.double() - wanted.double()).norm()
    return 0.0 if error == 0 else float(error / wanted.double().norm().clamp(min=max(floor, 1e-300)))
