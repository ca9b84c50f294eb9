# SPDX-License-Identifier: Apache-2.0
"""Where to cut an interval so that the lines of both halves enclose the least area: precomputed on a grid.

For a set of unary functions that read one unit, table[i, j] is the point p minimising area(l, p) + area(p, u) for
l, u on the grid, area being the integral of upper minus lower line. A query takes the next grid point inside each end;
outside the grid, or where the cell is empty, the midpoint.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from tilewright.verify.genbab.unary import Unary

RANGE = 5.0
CELL = 0.1
FINE = 0.02
VERSION = 2


def area(fn: Unary, l: Tensor, u: Tensor) -> Tensor:
    """Area between the default lines over [l, u]; infinite where there are no finite lines."""
    k = fn.default_slopes(l, u)
    b = fn.intercepts(k, l, u)
    found = (k[1] - k[0]) * (u * u - l * l) / 2 + (b[1] - b[0]) * (u - l)
    return torch.where(found.isfinite(), found, torch.full_like(found, torch.inf))


def build(functions: tuple[Unary, ...]) -> Tensor:
    """The table [G, G] for the summed area of some functions; NaN where there is no point."""
    coarse = torch.linspace(-RANGE, RANGE, round(2 * RANGE / CELL) + 1, dtype=torch.float64)
    fine = torch.linspace(-RANGE, RANGE, round(2 * RANGE / FINE) + 1, dtype=torch.float64)
    left = sum(_areas(fn, coarse[:, None], fine[None]) for fn in functions)
    right = sum(_areas(fn, fine[:, None], coarse[None]) for fn in functions)
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    table = torch.full((len(coarse), len(coarse)), torch.nan, dtype=torch.float64)
    for i in range(len(coarse)):
        total = left[i][:, None] + right
        inside = (fine[:, None] > coarse[i] + FINE / 2) & (fine[:, None] < coarse[None] - FINE / 2)
        total = torch.where(inside, total, torch.full_like(total, torch.inf))
        value, at = total.min(0)
        table[i] = torch.where(value.isfinite(), fine[at], torch.full_like(value, torch.nan))
    return table


def _areas(fn: Unary, l: Tensor, u: Tensor) -> Tensor:
    """Areas of all pairs with l < u; infinite elsewhere."""
    l, u = torch.broadcast_tensors(l, u)
    out = torch.full(l.shape, torch.inf, dtype=torch.float64)
    valid = l < u
    out[valid] = area(fn, l[valid], u[valid])
    return out


@functools.cache
def table_of(functions: tuple[Unary, ...]) -> Tensor:
    """The table of a set of functions, from the cache on disk when all are the package's own."""
    if not all(fn.builtin for fn in functions):
        return build(functions)
    path = _path("-".join(fn.name for fn in functions))
    found = _load(path)
    if found is None:
        found = build(functions)
        _save(path, found)
    return found


def _path(name: str) -> Path:
    from tilewright.data import cache_dir

    return cache_dir() / "genbab" / f"{name}-{RANGE:g}-{CELL:g}-v{VERSION}.npy"


def _load(path: Path) -> Tensor | None:
    """A stored table; None when there is none or it is no table of this shape."""
    import numpy as np

    size = round(2 * RANGE / CELL) + 1
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return torch.from_numpy(found) if found.shape == (size, size) and found.dtype == np.float64 else None


def _save(path: Path, table: Tensor) -> None:
    """Keep a table; a cache that cannot be written is no error."""
    import numpy as np

    from tilewright._files import atomic_write

    try:
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.save(file, table.numpy())
    except OSError:
        return


def points(functions: tuple[Unary, ...], l: Tensor, u: Tensor) -> Tensor:
    """Branching points inside (l, u), elementwise; the midpoint where the table has no word."""
    functions = tuple(sorted(functions, key=lambda fn: fn.name))
    middle = (l + u) / 2
    inside = (l > -RANGE) & (u < RANGE) & (u - l > CELL)
    if not inside.any():
        return middle
    table = table_of(functions)
    last = table.shape[0] - 1
    i = torch.ceil((l + RANGE) / CELL).nan_to_num(0.0).clamp(0, last).long()
    j = torch.floor((u + RANGE) / CELL).nan_to_num(0.0).clamp(0, last).long()
    p = table[i, j]
    good = inside & (p > l) & (p < u)
    return torch.where(good, p, middle)
