# SPDX-License-Identifier: Apache-2.0
"""Linear regression from sums over batches: memory d x d, however many tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-9
TOKENS_PER_INPUT = 5


@dataclass(frozen=True)
class LinearMap:
    """x -> weight x + bias. weight: float64 [out, in], bias: float64 [out]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rows [..., in] to [..., out], in x's dtype and on its device."""
        return x @ self.weight.to(x).T + self.bias.to(x)

    @staticmethod
    def zero(inputs: int, outputs: int) -> LinearMap:
        return LinearMap(torch.zeros(outputs, inputs, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64))


class LeastSquares:
    """argmin over B (and c) of sum ||y - B x - c||^2, from X^T X and X^T Y in float64.

    intercept: fit c as well. ridge: times the mean diagonal of X^T X, added to it; with a ridge given, fewer tokens
    than five an input are accepted.
    """

    def __init__(self, inputs: int, outputs: int, *, intercept: bool = False, ridge: float | None = None) -> None:
        self.intercept, self.ridge = intercept, ridge
        self.count = 0
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.x = torch.zeros(inputs, dtype=torch.float64)
        self.y = torch.zeros(outputs, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows x [n, in] with their y [n, out]."""
        x, y = x.double(), y.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.count += len(x)

    def solve(self) -> LinearMap:
        """The fitted map.

        Raises:
            ValueError: fewer than five tokens an input and no ridge given, or inputs that are all 0.
        """
        inputs = len(self.x)
        if self.ridge is None and self.count < TOKENS_PER_INPUT * inputs:
            raise ValueError(
                f"{self.count} tokens for a regression on {inputs} inputs; at least {TOKENS_PER_INPUT * inputs} are "
                "needed, or give a ridge"
            )
        xx, xy = self.xx, self.xy
        if self.intercept:
            xx = xx - torch.outer(self.x, self.x) / self.count
            xy = xy - torch.outer(self.x, self.y) / self.count
        mean = float(xx.diagonal().mean())
        if not mean > 0:
            raise ValueError("the inputs of the regression are all 0 (or all equal, with an intercept)")
        # 1e-9 is the smallest ridge that keeps the factorisation real where a channel is a copy of others.
        penalty = (RIDGE if self.ridge is None else self.ridge) * mean
        factor = torch.linalg.cholesky(xx + penalty * torch.eye(inputs, dtype=torch.float64))
        weight = torch.cholesky_solve(xy, factor).T
        bias = (self.y - weight @ self.x) / self.count if self.intercept else torch.zeros_like(self.y)
        return LinearMap(weight.contiguous(), bias)
