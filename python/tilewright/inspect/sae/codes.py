# SPDX-License-Identifier: Apache-2.0
"""Sparse codes: the few active latents of each token, and the sums of rows that are all an SAE does with them.

With k of m latents active, a decoder is a weighted sum of k of its rows (a gather), and the gradient of the decoder is,
latent by latent, a weighted sum of the residuals of the tokens that used it: the same gather with tokens and latents
exchanged, and so is the gradient of the encoder. Both are ``torch.nn.functional.embedding_bag``, which needs no dense
[tokens, latents] matrix. Everything here equals the dense masked form (tests/inspect/test_sae_codes.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

# Above this share of active latents a dense product is faster than gathering rows.
CROWDED = 1 / 16


@dataclass
class Support:
    """Which latents are active: of token t, ``index[offsets[t] : offsets[t + 1]]``.

    index: int64 [n], offsets: int64 [T + 1], width: number of latents m.
    """

    index: Tensor
    offsets: Tensor
    width: int
    _by_latent: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> Tensor:
        """Active latents of each token: int64 [T]."""
        return self.offsets.diff()

    @property
    def token(self) -> Tensor:
        """The token of each entry: int64 [n]."""
        return torch.arange(self.tokens, device=self.index.device).repeat_interleave(self.counts)

    @property
    def crowded(self) -> bool:
        """So many are active that dense products are faster."""
        return len(self.index) > CROWDED * self.tokens * self.width

    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order of the entries by latent [n], their tokens [n], offsets of the latents [m + 1]); computed once."""
        if self._by_latent is None:
            order = torch.argsort(self.index, stable=True)
            counts = torch.bincount(self.index, minlength=self.width)
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            self._by_latent = order, self.token[order], offsets
        return self._by_latent

    def dense(self, value: Tensor) -> Tensor:
        """[T, m] with ``value`` at the active places; differentiable."""
        return value.new_zeros(self.tokens, self.width).index_put((self.token, self.index), value)


@dataclass
class Codes:
    """Active latents and their values [n]; a value may be 0."""

    support: Support
    value: Tensor

    def dense(self) -> Tensor:
        """Latents [T, m]."""
        return self.support.dense(self.value)

    def decode(self, table: Tensor) -> Tensor:
        """Sum of each token's rows of ``table`` [m, d], weighted by the values: [T, d]."""
        return weighted_rows(self.value, table, self.support)

    def l0(self) -> Tensor:
        """Latents with a value other than 0, for each token: int64 [T]."""
        return torch.zeros_like(self.support.counts).index_add_(0, self.support.token, (self.value != 0).long())


def sum_rows(index: Tensor, weight: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """out[i] = sum over j in [offsets[i], offsets[i + 1]) of weight[j] table[index[j]]."""
    return embedding_bag(index, table, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True)


def rows_by_latent(support: Support, value: Tensor, rows: Tensor) -> Tensor:
    """For each latent the sum of ``rows`` [T, d] over the tokens that use it, weighted by the values: [m, d]."""
    if support.crowded:
        return support.dense(value).T @ rows
    order, token, offsets = support.by_latent()
    return sum_rows(token, value[order], offsets, rows)


class _RowGradient(torch.autograd.Function):
    """The identity of ``out``, which tells ``table`` its gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, _table: Tensor, value: Tensor, support: Support) -> Tensor:
        ctx.support = support
        ctx.save_for_backward(value)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (value,) = ctx.saved_tensors
        return grad, rows_by_latent(ctx.support, value, grad.contiguous()), None, None


def weighted_rows(value: Tensor, table: Tensor, support: Support) -> Tensor:
    """out[t] = sum of value x table row over token t's active latents; gradients for value [n] and table [m, d]."""
    if support.crowded:
        return support.dense(value) @ table
    out = sum_rows(support.index, value, support.offsets, table.detach())
    return _RowGradient.apply(out, table, value.detach(), support) if table.requires_grad else out


class _Preactivations(torch.autograd.Function):
    """Chosen entries of (x - b_dec) W_enc^T + b_enc, with gradients summed over those entries alone."""

    @staticmethod
    def forward(
        ctx: Any, chosen: Tensor, x: Tensor, weight: Tensor, _bias: Tensor, center: Tensor | None, support: Support
    ) -> Tensor:
        ctx.support = support
        ctx.save_for_backward(x, weight, *(() if center is None else (center,)))
        return chosen.view_as(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        support = ctx.support
        centered = x - rest[0] if rest else x
        to_bias = torch.zeros_like(weight[:, 0]).index_add_(0, support.index, grad)
        to_center = -(to_bias @ weight) if rest else None
        to_x = None
        if ctx.needs_input_grad[1]:
            dense = support.crowded
            to_x = support.dense(grad) @ weight if dense else sum_rows(support.index, grad, support.offsets, weight)
        return None, to_x, rows_by_latent(support, grad, centered), to_bias, to_center, None


def chosen_preactivations(
    pre: Tensor, x: Tensor, weight: Tensor, bias: Tensor, center: Tensor | None, support: Support
) -> Tensor:
    """Entries ``support`` of the preactivations ``pre`` [T, m] (computed without gradients): [n], differentiable.

    x [T, d], weight [m, d], bias [m], center [d] (or None): what ``pre`` was computed from.
    """
    chosen = pre.flatten()[support.token * support.width + support.index]
    return _Preactivations.apply(chosen, x, weight, bias, center, support)
