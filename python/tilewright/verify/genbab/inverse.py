# SPDX-License-Identifier: Apache-2.0
"""Where f' = k for functions without a closed form: a table of brackets and a few secant steps.

Between two inflections f' is monotone, so f - k x is convex or concave there. For a point x and a bracket [a, b] that
holds the critical point, convexity gives |g(x) - g(x*)| <= |f'(x) - k| (b - a): a bound on what the iteration left,
whatever it did.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright.verify.genbab.unary import Function, Unary

REACH = 1e8
"""Bounds beyond this are outside the table, and outside the domain of a function that needs it."""

CELLS = 1024
STEPS = 2


def _edges(left: float, right: float) -> Tensor:
    """Ascending grid of a piece; uniform where it matters, geometric towards an infinite end."""
    core = 16.0
    a = left if math.isfinite(left) else min(-core, right - 1)
    b = right if math.isfinite(right) else max(core, left + 1)
    parts = [torch.linspace(a, b, CELLS, dtype=torch.float64)]
    far = torch.logspace(0, math.log10(REACH), 257, dtype=torch.float64)[1:]
    if not math.isfinite(left):
        parts.insert(0, (a + 1 - far).flip(0))
    if not math.isfinite(right):
        parts.append(b - 1 + far)
    return torch.cat(parts)


class Piece:
    """One interval on which f' is monotone: its grid, and f' on it in ascending order."""

    def __init__(self, df: Function, left: float, right: float) -> None:
        self.x = _edges(left, right)
        d = df(self.x)
        if not d.isfinite().all():
            raise ValueError(f"df is not finite everywhere between {left} and {right}; give a smaller domain")
        self.rising = bool(d[-1] >= d[0])
        d = d if self.rising else -d
        drop = (d.cummax(0).values - d).max()
        if drop > 1e-9 * (1 + d.abs().max()):
            raise ValueError(
                f"df is not monotone between {left} and {right} (it turns by {drop:.3g}); list every inflection"
            )
        self.d = d.cummax(0).values

    def bracket(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ends of the cell that holds f' = k, and how far f' is from k there, the sign being that of a rising f'; NaN
        where the piece has no such point."""
        k = k.contiguous() if self.rising else -k
        x, d = self.x.to(k), self.d.to(k)
        cell = torch.searchsorted(d, k).clamp(1, len(d) - 1)
        k = torch.where((k >= d[0]) & (k <= d[-1]), k, torch.full_like(k, math.nan))
        hidden = k - k
        return x[cell - 1] + hidden, x[cell] + hidden, d[cell - 1] - k, d[cell] - k


class Inverse:
    """Critical points of f - k x, one a piece, with the error of each."""

    def __init__(self, df: Function, inflections: Sequence[float], domain: tuple[float, float]) -> None:
        self.df = df
        cuts = [domain[0], *inflections, domain[1]]
        self.pieces = [Piece(df, left, right) for left, right in itertools.pairwise(cuts)]

    def critical(self, k: Tensor, l: Tensor, u: Tensor) -> list[Tensor]:
        """One candidate a piece (NaN where there is none)."""
        return [x for x, _ in self.solved(k, l, u)]

    def solved(self, k: Tensor, l: Tensor, u: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each piece a candidate (NaN where there is none), and how far f - k x there can be from its extremum on
        the part of [l, u] that the piece's bracket meets."""
        return [self._solve(piece, k, l, u) for piece in self.pieces]

    def _solve(self, piece: Piece, k: Tensor, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        first, last, fa, fb = piece.bracket(k)
        a, b, x = first, last, first
        for _ in range(STEPS):
            # Secant point, kept inside.
            slope = fb - fa
            x = torch.where(slope > 0, b - fb * (b - a) / slope, (a + b) / 2)
            x = torch.minimum(torch.maximum(x, a), b)
            fx = self.df(x) - k
            fx = fx if piece.rising else -fx
            right = fx >= 0
            a, fa = torch.where(right, a, x), torch.where(right, fa, fx)
            b, fb = torch.where(right, x, b), torch.where(right, fx, fb)
        x = torch.where(fa.abs() < fb.abs(), a, b)
        width = (torch.minimum(last, u) - torch.maximum(first, l)).clamp(min=0)
        error = (self.df(x) - k).abs() * width
        return x, torch.where(error.isfinite(), error, torch.zeros_like(error))


def unary_relaxation(
    f: Function,
    df: Function,
    inflections: Sequence[float] = (),
    *,
    name: str = "custom",
    domain: tuple[float, float] = (-math.inf, math.inf),
) -> Unary:
    """Sound linear bounds for a continuously differentiable function of one variable.

    f, df: the function and its derivative on float64 tensors, elementwise. inflections: every point of the domain
    where the second derivative changes sign. Bounds beyond 1e8 count as outside the domain.

    Raises:
        ValueError: df is not monotone between two neighbouring inflections, or not finite on the domain.
    """
    inflections = tuple(sorted(float(x) for x in inflections))
    inverse = Inverse(df, inflections, domain)
    reach = (max(domain[0], -REACH / 2), min(domain[1], REACH / 2))
    return Unary(
        name,
        f,
        df,
        inverse.critical,
        inflections,
        tuple(1 if piece.rising else -1 for piece in inverse.pieces),
        domain=reach,
        builtin=False,
        iterative=inverse,
    )
