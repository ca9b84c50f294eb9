# SPDX-License-Identifier: Apache-2.0
"""A linear layer with one weight a memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

XAVIER_GAIN = 2**-2.5


class GroupedLinear(nn.Module):
    """`y_r = x_r W_{m(r)}^T + b_{m(r)}` for rows sorted by memory m: one matrix product a memory that has rows.

    Args:
        groups: M. in_features, out_features: of each weight. bias: with `[M, out_features]`, zero at first.
    """

    def __init__(self, groups: int, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(groups, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Each weight Xavier uniform with gain 2^-2.5 (the reference's), bias 0."""
        for one in self.weight:
            nn.init.xavier_uniform_(one, gain=XAVIER_GAIN, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """rows `[R, in]`, the first sizes[0] of memory 0 and so on, to `[R, out]`."""
        # split and unbind, because the gradient of a slice would be as large as what it was cut from
        biases = [None] * len(sizes) if self.bias is None else self.bias.unbind()
        parts = [F.linear(*one) for one in zip(rows.split(list(sizes)), self.weight.unbind(), biases, strict=True)]
        return torch.cat(parts)

    def extra_repr(self) -> str:
        groups, out_features, in_features = self.weight.shape
        return f"groups={groups}, in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"
