# SPDX-License-Identifier: Apache-2.0
"""The activations A [d, n] and the features Z [d, k], each in the form that makes its products cheap."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPARSE_BELOW = 0.15
"""Share of kept entries under which a product by rows of A beats the dense one."""


@dataclass(frozen=True)
class Features:
    """Z [d, k] as m entries a column: ``index`` int64 [k, m], ascending in each row, and ``value`` [k, m]."""

    index: Tensor
    value: Tensor
    width: int

    def dense(self) -> Tensor:
        """Z^T [k, d]."""
        out = self.value.new_zeros(self.index.shape[0], self.width)
        return out.scatter_(1, self.index, self.value)

    def scaled(self, factor: Tensor) -> Features:
        """Column j times factor[j]."""
        return Features(self.index, self.value * factor[:, None].to(self.value.dtype), self.width)

    def gram(self) -> Tensor:
        """Q = Z^T Z, float64 [k, k]."""
        z = self.dense().double()
        return z @ z.T

    def times(self, a: Tensor) -> Tensor:
        """P^T = Z^T A [k, n] of a contiguous A [d, n]: m of its d rows a feature where few entries are kept."""
        k, m = self.index.shape
        if m > SPARSE_BELOW * self.width or not (a.is_cuda or torch.backends.mkl.is_available()):
            return self.dense() @ a
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            starts = torch.arange(0, k * m + 1, m, device=a.device)
            rows = torch.sparse_csr_tensor(
                starts, self.index.reshape(-1), self.value.reshape(-1), (k, self.width), check_invariants=False
            )
        return rows @ a


class Activations:
    """A [d, n]: one copy in memory, neuron by neuron, or blocks of tokens that are read again in every sweep.

    rows: one matrix [n, d], or several whose rows follow each other. One is copied once; several are taken as they
    are (a list of views of a memory-mapped file costs no memory) and turned one at a time.

    Raises:
        ValueError: no rows, blocks of several widths, or NaN or infinite values (the first such row is named).
    """

    def __init__(self, rows: Tensor | Sequence[Tensor], dtype: torch.dtype) -> None:
        self.streamed = not isinstance(rows, Tensor)
        blocks = [rows] if isinstance(rows, Tensor) else list(rows)
        if not blocks or sum(len(b) for b in blocks) == 0:
            raise ValueError("X has no rows; at least one token is needed")
        widths = {tuple(b.shape[1:]) for b in blocks}
        if len(widths) > 1 or any(b.dim() != 2 for b in blocks):
            raise ValueError(
                f"X has blocks of shapes {[list(b.shape) for b in blocks[:4]]}; [n, d] with one d is needed"
            )
        self.dtype, self.device = dtype, blocks[0].device
        self.width = blocks[0].shape[1]
        self.sizes = [len(b) for b in blocks]
        self.tokens = sum(self.sizes)
        self._blocks = blocks if self.streamed else [self._turned(blocks[0])]
        self.column_squares = torch.cat([self._squares(start, a) for start, a in self.pieces()])
        self.squared = float(self.column_squares.sum())

    def _turned(self, rows: Tensor) -> Tensor:
        return rows.detach().to(self.device, self.dtype).T.contiguous()

    def _squares(self, start: int, a: Tensor) -> Tensor:
        """Squared norm of every token, float64 [n]; refuses what is not finite."""
        squares = a.new_zeros(a.shape[1], dtype=torch.float64)
        for some in a.split(256):
            squares += some.double().square().sum(0)
        bad = (~squares.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"X holds NaN or infinity, first in row {start + int(bad[0])}; remove or repair that token"
            )
        return squares

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """(first token, A of the block [d, n_b]) in order."""
        start = 0
        for size, block in zip(self.sizes, self._blocks, strict=True):
            if size:
                yield start, self._turned(block) if self.streamed else block
            start += size

    def times(self, y: Tensor) -> Tensor:
        """A Y^T, float64 [d, k], for Y [k, n]."""
        total = torch.zeros(self.width, y.shape[0], dtype=torch.float64, device=self.device)
        for start, a in self.pieces():
            total += a @ y[:, start : start + a.shape[1]].T
        return total

    def project(self, features: Features) -> Tensor:
        """P^T = Z^T A [k, n]."""
        parts = [features.times(a) for _, a in self.pieces()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def column(self, token: int) -> Tensor:
        """A[:, token] [d]."""
        for start, a in self.pieces():
            if start <= token < start + a.shape[1]:
                return a[:, token - start]
        raise IndexError(token)

    def responses(self, direction: Tensor) -> Tensor:
        """direction^T A [n]."""
        return torch.cat([direction @ a for _, a in self.pieces()])
