# SPDX-License-Identifier: Apache-2.0
"""Affine maps between flattened tensors: as matrices where they are small, as functions where they are not.

y = sum_i L_i(x_i) + v. The backward pass needs L_i^T applied to rows of coefficients, interval arithmetic needs
|L_i|. A function's transpose is what reverse-mode differentiation of it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]

DENSE_ENTRIES = 1 << 20
"""A map with at most this many matrix entries is stored as a matrix (8 MB in float64)."""


class Affine(Protocol):
    """An affine map of several flattened inputs [..., n_i] to [..., m]."""

    bias: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        """n_i of each input."""

    def apply(self, xs: Sequence[Tensor]) -> Tensor:
        """y for inputs [B, n_i]."""

    def transpose(self, a: Tensor) -> list[Tensor]:
        """Rows a [B, S, m] times each L_i: [B, S, n_i]."""

    def radius(self, rs: Sequence[Tensor]) -> Tensor:
        """sum_i |L_i| r_i for r_i [B, n_i]."""


@dataclass(eq=False)
class Dense:
    """Matrices [m, n_i] and a bias [m]."""

    weights: list[Tensor]
    bias: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(w.shape[1] for w in self.weights)

    def apply(self, xs: Sequence[Tensor]) -> Tensor:
        y = self.bias
        for x, w in zip(xs, self.weights, strict=True):
            y = y + x @ w.T
        return y

    def transpose(self, a: Tensor) -> list[Tensor]:
        return [a @ w for w in self.weights]

    def radius(self, rs: Sequence[Tensor]) -> Tensor:
        y = torch.zeros_like(self.bias)
        for r, w in zip(rs, self.weights, strict=True):
            y = y + r @ w.abs().T
        return y


@dataclass(eq=False)
class Operator:
    """A function of unflattened tensors without a batch axis, and the same with absolute coefficients.

    fn: affine in all its arguments. magnitude: sum_i |L_i| x_i, linear. shapes: of the arguments.
    """

    fn: Callable[..., Tensor]
    magnitude: Callable[..., Tensor]
    shapes: list[Shape]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        zeros = [torch.zeros(shape, dtype=self.dtype) for shape in self.shapes]
        self.bias = self.fn(*zeros).reshape(-1)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    def _batched(self, fn: Callable[..., Tensor], xs: Sequence[Tensor]) -> Tensor:
        shaped = [x.reshape(-1, *shape) for x, shape in zip(xs, self.shapes, strict=True)]
        return torch.func.vmap(fn)(*shaped).reshape(shaped[0].shape[0], -1)

    def apply(self, xs: Sequence[Tensor]) -> Tensor:
        return self._batched(self.fn, xs)

    def radius(self, rs: Sequence[Tensor]) -> Tensor:
        return self._batched(self.magnitude, rs)

    def transpose(self, a: Tensor) -> list[Tensor]:
        zeros = [torch.zeros(shape, dtype=self.dtype) for shape in self.shapes]
        y, pull, *_ = torch.func.vjp(self.fn, *zeros)
        rows = torch.func.vmap(pull)(a.reshape(-1, *y.shape))
        return [row.reshape(*a.shape[:-1], -1) for row in rows]


def dense_if_small(op: Operator) -> Dense | Operator:
    """The matrix form when it has at most DENSE_ENTRIES entries."""
    m = op.bias.numel()
    if m * sum(op.sizes) > DENSE_ENTRIES or not op.sizes:
        return op
    rows = op.transpose(torch.eye(m, dtype=op.dtype)[None])
    return Dense([w[0] for w in rows], op.bias)


def compose(outer: Dense, position: int, inner: Dense) -> Dense:
    """outer with its input ``position`` replaced by inner's output."""
    w = outer.weights[position]
    weights = [*outer.weights[:position], *(w @ v for v in inner.weights), *outer.weights[position + 1 :]]
    return Dense(weights, outer.bias + w @ inner.bias)
