# SPDX-License-Identifier: Apache-2.0
"""Input sets: boxes, and boxes cut with a ball."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Region:
    """B input sets: the box [x_L, x_U] ([B, n] each), cut with {||x - centre||_norm <= eps} when a norm is given.

    norm: 1 or 2 (infinity is a box). centre [B, n], eps [B].
    normals [B, K, n], offsets [B, K]: half-spaces normal . x >= offset that bounds may use too; 0 and 0 is none. Points
    drawn from the set or moved into it know nothing of them.
    """

    x_L: Tensor
    x_U: Tensor
    norm: float | None = None
    centre: Tensor | None = None
    eps: Tensor | None = None
    normals: Tensor | None = None
    offsets: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.x_L.shape[0]

    def minimum(self, a: Tensor) -> Tensor:
        """min over the set of a . x for rows a [B, S, n]: a lower bound of it for a box cut with others. [B, S]"""
        middle, radius = (self.x_L + self.x_U) / 2, (self.x_U - self.x_L) / 2
        left, gain = self._relaxed(a)
        low = (left @ middle.unsqueeze(-1) - left.abs() @ radius.unsqueeze(-1)).squeeze(-1) + gain
        if self.norm is None:
            return low
        assert self.centre is not None
        assert self.eps is not None
        dual = torch.linalg.vector_norm(a, ord=2 if self.norm == 2 else math.inf, dim=-1)
        ball = (a @ self.centre.unsqueeze(-1)).squeeze(-1) - self.eps.unsqueeze(-1) * dual
        return torch.maximum(low, ball)

    def _relaxed(self, a: Tensor) -> tuple[Tensor, Tensor | float]:
        """(a - sum_k beta_k normal_k, sum_k beta_k offset_k) with multipliers beta >= 0, one half-space after the
        other, each with the best multiplier given those before it. Any beta >= 0 is sound."""
        if self.normals is None:
            return a, 0.0
        assert self.offsets is not None
        gain = a.new_zeros(a.shape[:2])
        for normal, offset in zip(self.normals.unbind(1), self.offsets.unbind(1), strict=True):
            beta = best_multiplier(
                a.detach(), normal.unsqueeze(1), offset.unsqueeze(1), self.x_L.unsqueeze(1), self.x_U.unsqueeze(1)
            )
            a = a - beta.unsqueeze(-1) * normal.unsqueeze(1)
            gain = gain + beta * offset.unsqueeze(1)
        return a, gain

    def minimiser(self, a: Tensor) -> Tensor:
        """A corner of the box where a . x is least, moved into the ball. a [B, n] -> [B, n]"""
        return self.project(torch.where(a >= 0, self.x_L, self.x_U))

    def project(self, x: Tensor) -> Tensor:
        """Points [..., B, n] moved into the set (towards the centre for a ball, which need not be nearest)."""
        x = torch.minimum(torch.maximum(x, self.x_L), self.x_U)
        if self.norm is None:
            return x
        assert self.centre is not None
        assert self.eps is not None
        away = x - self.centre
        length = torch.linalg.vector_norm(away, ord=self.norm, dim=-1, keepdim=True)
        factor = torch.where(length > self.eps.unsqueeze(-1), self.eps.unsqueeze(-1) / length, torch.ones_like(length))
        # The ball's centre lies in the box, so a point pulled towards it stays inside.
        return self.centre + away * factor * (1 - 1e-12)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform points of the box moved into the set: [count, B, n]."""
        t = torch.rand((count, *self.x_L.shape), generator=generator, dtype=self.x_L.dtype)
        return self.project(self.x_L + t * (self.x_U - self.x_L))

    def take(self, rows: Tensor) -> Region:
        """The sets of some batch rows."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        return replace(
            self,
            x_L=self.x_L[rows],
            x_U=self.x_U[rows],
            centre=pick(self.centre),
            eps=pick(self.eps),
            normals=pick(self.normals),
            offsets=pick(self.offsets),
        )

    def with_box(self, x_L: Tensor, x_U: Tensor) -> Region:
        """Other boxes, the ball of row 0 for all of them."""
        if self.norm is None:
            return Region(x_L, x_U)
        assert self.centre is not None
        assert self.eps is not None
        return Region(x_L, x_U, self.norm, self.centre[:1].expand_as(x_L), self.eps[:1].expand(x_L.shape[0]))


def best_multiplier(a: Tensor, normal: Tensor, offset: Tensor, x_L: Tensor, x_U: Tensor) -> Tensor:
    """The beta >= 0 that maximises min over the box of (a - beta normal) . x + beta offset, for rows a [..., n].

    All arguments broadcast against a, offset without the last axis. The minimum is concave and piecewise linear in beta
    with a bend at each a_i / normal_i, where its slope falls by |normal_i| times the width of the box: the bends in
    ascending order are walked until the slope is not positive. Where it stays positive the half-space misses the box;
    nothing is made of that.
    """
    width = normal.abs() * (x_U - x_L)
    bend = a / normal
    # Only bends ahead of 0 count; where normal_i is 0 the quotient is infinite or NaN and the fall nothing.
    fall = torch.where(bend > 0, width, torch.zeros_like(a))
    slope = offset + fall.sum(-1) - (normal * (x_L + x_U) + width).sum(-1) / 2
    beta = torch.zeros_like(slope)
    active = slope > 0
    bend, order = torch.where(bend > 0, bend, torch.full_like(bend, torch.inf))[active].sort(-1)
    below = slope[active].unsqueeze(-1) - fall[active].gather(-1, order).cumsum(-1)
    stop = (below > 0).sum(-1, keepdim=True).clamp(max=a.shape[-1] - 1)
    beta[active] = bend.gather(-1, stop).squeeze(-1)
    return torch.where(beta.isfinite(), beta, torch.zeros_like(beta))


def box_region(x_L: Tensor, x_U: Tensor, dtype: torch.dtype, name: str = "x_L, x_U") -> Region:
    """A region of boxes [B, ...] flattened.

    Raises:
        ValueError: shapes differ, a bound is NaN or infinite, or a box is empty (x_L > x_U somewhere).
    """
    x_L, x_U = x_L.detach().to(dtype), x_U.detach().to(dtype)
    if x_L.shape != x_U.shape:
        raise ValueError(f"{name}: shapes {tuple(x_L.shape)} and {tuple(x_U.shape)} differ; they must be equal")
    if not (x_L.isfinite().all() and x_U.isfinite().all()):
        raise ValueError(f"{name}: a bound is NaN or infinite; the input set must be a finite box")
    if not (x_L <= x_U).all():
        where = torch.nonzero(~(x_L <= x_U))[0].tolist()
        raise ValueError(f"{name}: the box is empty at index {where} (x_L > x_U); swap the bounds or drop the case")
    return Region(x_L.reshape(x_L.shape[0], -1), x_U.reshape(x_U.shape[0], -1))
