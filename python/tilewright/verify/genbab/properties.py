# SPDX-License-Identifier: Apache-2.0
"""Properties of outputs in normal form: every clause needs at least one row with c . y + d > 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Property:
    """K clauses of R rows: c [K, R, n_out], d [K, R]. Shorter clauses repeat a row, which changes nothing."""

    c: Tensor
    d: Tensor

    def margins(self, y: Tensor) -> Tensor:
        """How far clause k holds at outputs y [..., n_out]: max over its rows of c . y + d, [..., K]."""
        return (torch.einsum("krn,...n->...kr", self.c, y) + self.d).amax(-1)

    def violated(self, y: Tensor) -> Tensor:
        """Whether some clause fails at y [..., n_out]; outputs that are not finite violate nothing."""
        margin = self.margins(y)
        return ((margin <= 0) & margin.isfinite()).any(-1)


def conjunction(c: Tensor, rhs: Tensor | float, n_out: int, dtype: torch.dtype) -> Property:
    """Every row of c y must exceed rhs: one clause a row."""
    c = torch.as_tensor(c, dtype=dtype)
    c = c[None] if c.dim() == 1 else c
    if c.dim() != 2 or c.shape[1] != n_out:
        raise ValueError(f"C has shape {tuple(c.shape)}; [rows, {n_out}] is needed, {n_out} being the model's outputs")
    d = -torch.as_tensor(rhs, dtype=dtype).expand(c.shape[0])
    return _checked(c[:, None], d[:, None])


def clauses(rows: Sequence[tuple[Tensor, Tensor]], n_out: int, dtype: torch.dtype) -> Property:
    """From (c [R_k, n_out], d [R_k]) for each clause."""
    width = max((len(d) for _, d in rows), default=0)
    if not width:
        raise ValueError("the property has no clause with a row")
    cs, ds = [], []
    for c, d in rows:
        if c.dim() != 2 or c.shape[1] != n_out or len(d) != len(c) or not len(c):
            raise ValueError(
                f"a clause has shapes {tuple(c.shape)} and {tuple(d.shape)}; [R, {n_out}] and [R] are needed"
            )
        index = torch.arange(width).clamp(max=len(d) - 1)
        cs.append(c.to(dtype)[index])
        ds.append(d.to(dtype)[index])
    return _checked(torch.stack(cs), torch.stack(ds))


def _checked(c: Tensor, d: Tensor) -> Property:
    if not (c.isfinite().all() and d.isfinite().all()):
        raise ValueError("C and rhs must be finite; a coefficient is NaN or infinite")
    return Property(c, d)
