# SPDX-License-Identifier: Apache-2.0
"""Sound linear bounds of one-dimensional functions, one construction for all of them.

For any slope k, with g(x) = f(x) - k x and P = {l, u, points of (l, u) where f' = k, kinks in (l, u)}:

    k x + min over P of g  <=  f(x)  <=  k x + max over P of g          for every x in [l, u],

and both lines are the tightest of that slope. A candidate that falls outside [l, u] is clamped into it: it stays a
point of the function, so the extremum over more points than P is the same number.

Shapes: bounds ``l, u`` and slopes broadcast against each other; "two-sided" tensors have a leading axis of 2 (lower
line, upper line).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Critical = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]

BISECTIONS = 22
"""Halvings of the slope's range for the default line of a function that jumps; any slope is sound, this many leave
3e-7 of the range."""
SUPPORT_STEPS = 9
"""Steps towards the default line of any other function."""

SIDES = (1.0, -1.0)


@dataclass(frozen=True, eq=False)
class Unary:
    """A function f: R -> R that the bounds know.

    f, df: the function and its derivative (at a kink either one-sided value).
    critical: (k, l, u) -> tensors that contain every x of (l, u) where f'(x) = k; more points do no harm, NaN and
        infinities are ignored.
    inflections: where f'' changes sign, ascending; curvature: the sign of f'' on each piece between them, left to
        right (0 where it is a line). None: every piece counts as mixed.
    kinks: where f has no derivative (f continuous); convex: f is convex over all of R although it has kinks.
    jumps: (x, value just left, value just right) where f is not continuous.
    domain: closed interval on which f is defined; where bounds leave it the lines are infinite. pole: a point inside
        the domain that bounds must not touch.
    slope_limit: (l, u) -> the steepest slope to try, where f' is unbounded.
    iterative: for critical points found by iteration, what finds them (:class:`.inverse.Inverse`) and says how far
        f - k x can be from its extremum there.
    """

    name: str
    f: Function
    df: Function
    critical: Critical = lambda k, l, u: ()  # noqa: ARG005
    inflections: tuple[float, ...] = ()
    curvature: tuple[int, ...] | None = None
    kinks: tuple[float, ...] = ()
    jumps: tuple[tuple[float, float, float], ...] = ()
    domain: tuple[float, float] = (-math.inf, math.inf)
    slope_limit: Callable[[Tensor, Tensor], Tensor] | None = None
    pole: float | None = None
    convex: bool = False
    builtin: bool = True
    iterative: Any = None

    def __repr__(self) -> str:
        return f"Unary({self.name})"

    @property
    def piecewise_linear(self) -> bool:
        """Whether f is a line between its kinks and jumps."""
        return self.curvature is not None and not any(self.curvature)

    @property
    def breaks(self) -> tuple[float, ...]:
        """Kinks and jumps: where a split makes both parts simpler."""
        return tuple(sorted((*self.kinks, *(jump[0] for jump in self.jumps))))

    def is_line(self, l: Tensor, u: Tensor) -> Tensor:
        """Where f on [l, u] is one line, so that its bounds are exact."""
        if not self.piecewise_linear:
            return torch.zeros_like(l, dtype=torch.bool)
        line = torch.ones_like(l, dtype=torch.bool)
        for x in self.breaks:
            line &= (l >= x) | (u <= x)
        return line

    def outside(self, l: Tensor, u: Tensor) -> Tensor:
        """Where [l, u] is not inside the domain, beyond rounding (1e-9); NaN counts as outside."""
        lo, hi = self.domain
        slack = 1e-9 if math.isfinite(lo) and self.f(torch.tensor(lo, dtype=l.dtype)).isfinite() else 0.0
        inside = (l >= lo - slack) & (u <= hi) & (l <= u)
        return ~(inside if self.pole is None else inside & ((l > self.pole) | (u < self.pole)))

    def slope_range(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest f' on [l, u]."""
        points = [l, u, *(_inside(torch.full_like(l, x), l, u) for x in self.inflections)]
        low = high = self.df(l)
        for point in points[1:]:
            d = self.df(point)
            low, high = torch.minimum(low, d), torch.maximum(high, d)
        for x in self.kinks:
            inside = (l < x) & (u > x)
            # A kink's two derivatives, taken a little to the left and to the right of it.
            step = 1e-6 * max(1.0, abs(x))
            for y in (x - step, x + step):
                d = self.df(torch.full_like(l, y))
                low = torch.where(inside, torch.minimum(low, d), low)
                high = torch.where(inside, torch.maximum(high, d), high)
        for x, before, after in self.jumps:
            inside = (l < x) & (u > x)
            steep = abs(after - before) / torch.maximum(torch.minimum(u - x, x - l), (u - l) * 1e-3).clamp(min=1e-9)
            high = torch.where(inside, torch.maximum(high, steep), high)
            low = torch.where(inside, torch.minimum(low, torch.zeros_like(low)), low)
        if self.slope_limit is not None:
            limit = self.slope_limit(l, u)
            low, high = torch.maximum(torch.minimum(low, limit), -limit), torch.minimum(high, limit)
        return low, high

    def free_sides(self, l: Tensor, u: Tensor) -> Tensor:
        """Two-sided mask: whether other slopes than the default can be worth trying.

        On a convex piece no upper line beats the chord anywhere, on a concave one no lower line does.
        """
        if self.curvature is None:
            return torch.ones((2, *l.shape), dtype=torch.bool)
        cuts = sorted({*self.inflections, *self.breaks})
        convex = torch.zeros_like(l, dtype=torch.bool)
        concave = torch.zeros_like(l, dtype=torch.bool)
        edges = [-math.inf, *cuts, math.inf]
        for left, right, sign in zip(edges[:-1], edges[1:], self.curvature, strict=True):
            inside = (l >= left) & (u <= right)
            convex |= inside & (sign >= 0)
            concave |= inside & (sign <= 0)
        if self.convex:
            convex = torch.ones_like(convex)
        return torch.stack([~concave, ~convex])

    def extreme(self, k: Tensor, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Two-sided slopes -> (intercepts, where they are attained), not widened for rounding."""
        sign = k.new_tensor(SIDES).view(2, *(1,) * (k.dim() - 1))
        l, u = torch.broadcast_to(l, k.shape[1:]), torch.broadcast_to(u, k.shape[1:])
        best = sign * (self.f(l) - k * l)
        at = l.expand_as(k)
        best, at = _take(best, at, sign * (self.f(u) - k * u), u)
        for x, error in self._candidates(k, l, u):
            x = _inside(x, l, u)
            best, at = _take(best, at, sign * (self.f(x) - k * x) - error, x)
        for kink in self.kinks:
            x = _inside(torch.full_like(k, kink), l, u)
            best, at = _take(best, at, sign * (self.f(x) - k * x), x)
        for jump, before, after in self.jumps:
            x = torch.full_like(k, jump)
            for limit, seen in ((before, (l < jump) & (u >= jump)), (after, (u > jump) & (l <= jump))):
                candidate = torch.where(seen, sign * (limit - k * x), torch.full_like(k, math.inf))
                best, at = _take(best, at, candidate, x)
        return sign * best, at

    def _candidates(self, k: Tensor, l: Tensor, u: Tensor) -> list[tuple[Tensor, Tensor | float]]:
        """Critical points, and how far f - k x can be from its extremum at each."""
        if self.iterative is not None:
            return list(self.iterative.solved(k, l, u))
        return [(x, 0.0) for x in self.critical(k, l, u)]

    def intercepts(self, k: Tensor, l: Tensor, u: Tensor) -> Tensor:
        """Two-sided intercepts, differentiable in k, l and u, widened by 4 eps (|f| + |k x| + 1) and where the domain
        ends infinite."""
        return _Intercept.apply(k, l, u, self)

    def default_slopes(self, l: Tensor, u: Tensor) -> Tensor:
        """Two-sided slopes whose lines enclose the least area over [l, u]: they support the convex and the concave
        envelope at the midpoint. On a convex piece that is the tangent there below and the chord above."""
        chord = self.chord_slopes(l, u)
        tangent = self.df((l + u) / 2)
        if self.slope_limit is not None:
            tangent = torch.minimum(tangent, self.slope_limit(l, u))
        free = self.free_sides(l, u)
        k = torch.where(free, tangent, chord)
        mixed = free.all(0) & (l < u)
        if mixed.any():
            k[:, mixed] = self._supporting(l[mixed], u[mixed], chord[mixed])
        if self.name == "exp":
            # A tangent point beyond l + 1 would make the lower line negative at l.
            k = torch.stack([torch.minimum(k[0], torch.exp(l + 0.99)), k[1]])
        return torch.where(k.isfinite(), k, torch.zeros_like(k))

    def _supporting(self, l: Tensor, u: Tensor, chord: Tensor) -> Tensor:
        """Slopes [2, n] supporting both envelopes at the midpoints: k m + b(k) is concave with derivative m - x*.

        Of two slopes that enclose the wanted one the lines touch f on either side of the midpoint, and the chord
        through both touching points is the next guess: it is exact where an envelope is straight, and converges as a
        secant does elsewhere. Every third step halves instead.
        """
        low, high = self.slope_range(l, u)
        middle = (l + u) / 2
        lo, hi = low.expand(2, -1).clone(), high.expand(2, -1).clone()
        side = l.new_tensor(SIDES).view(2, 1)
        at_lo, at_hi = self.extreme(lo, l, u)[1], self.extreme(hi, l, u)[1]
        for step in range(BISECTIONS if self.jumps else SUPPORT_STEPS):
            k = (lo + hi) / 2
            if step % 3 and not self.jumps:
                guess = (self.f(at_hi) - self.f(at_lo)) / (at_hi - at_lo)
                k = torch.where((guess > lo) & (guess < hi), guess, k)
            _, at = self.extreme(k, l, u)
            up = side * (middle - at) > 0
            lo, hi = torch.where(up, k, lo), torch.where(up, hi, k)
            at_lo, at_hi = torch.where(up, at, at_lo), torch.where(up, at_hi, at)
        best = torch.full_like(k, -math.inf)
        for tried in (lo, hi, k, chord.expand_as(k)):
            height = side * (self.extreme(tried, l, u)[0] + tried * middle)
            k, best = torch.where(height > best, tried, k), torch.maximum(height, best)
        return k

    def chord_slopes(self, l: Tensor, u: Tensor) -> Tensor:
        """The slope from (l, f(l)) to (u, f(u)); f'(l) on intervals too short to divide by, 0 where it is infinite."""
        width = u - l
        narrow = width <= 1e-12 * (1 + l.abs() + u.abs())
        chord = torch.where(
            narrow, self.df(l), (self.f(u) - self.f(l)) / torch.where(narrow, torch.ones_like(width), width)
        )
        return torch.where(chord.isfinite(), chord, torch.zeros_like(chord))

    def values(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Range of f over [l, u]."""
        zero = torch.zeros((2, *l.shape), dtype=l.dtype, device=l.device)
        low, high = self.intercepts(zero, l, u)
        return low, high


def _inside(x: Tensor, l: Tensor, u: Tensor) -> Tensor:
    """x clamped to [l, u]; NaN becomes l."""
    return torch.minimum(torch.maximum(torch.where(x.isnan(), l, x), l), u)


def _take(best: Tensor, at: Tensor, value: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller of two values and its place; NaN wins, so that it is seen."""
    less = (value < best) | value.isnan()
    return torch.where(less, value, best), torch.where(less, x, at)


class _Intercept(torch.autograd.Function):
    """Intercepts with the envelope theorem's gradient: d/dk = -x*, and f'(x*) - k where x* is an end of [l, u]."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, l: Tensor, u: Tensor, fn: Unary) -> Tensor:
        l, u = torch.broadcast_to(l, k.shape[1:]), torch.broadcast_to(u, k.shape[1:])
        outside = fn.outside(l, u)
        lo, hi = fn.domain
        inner_l = l if lo == -math.inf else l.clamp(min=lo)
        value, at = fn.extreme(k, inner_l, torch.maximum(inner_l, u if hi == math.inf else u.clamp(max=hi)))
        ctx.save_for_backward(k, l, u, at)
        ctx.fn = fn
        side = k.new_tensor(SIDES).view(2, *(1,) * (k.dim() - 1))
        line = (k * at).abs()
        value = value - side * (4 * torch.finfo(k.dtype).eps * ((value.abs() + line) + line + 1))
        bad = outside | ~value.isfinite()
        return torch.where(bad, -side * math.inf, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, l, u, at = ctx.saved_tensors
        to_k = -at * grad if ctx.needs_input_grad[0] else None
        to_l = to_u = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            slope = (ctx.fn.df(at) - k) * grad
            slope = torch.where(slope.isfinite(), slope, torch.zeros_like(slope))
            to_l = torch.where(at == l, slope, torch.zeros_like(slope)).sum(0)
            to_u = torch.where((at == u) & (u > l), slope, torch.zeros_like(slope)).sum(0)
        return to_k, to_l, to_u, None
