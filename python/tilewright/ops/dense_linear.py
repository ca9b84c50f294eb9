# SPDX-License-Identifier: Apache-2.0
"""Linear layers of embeddings and output heads: INT8 groups and bfloat16. Kernels: csrc/ops/{int8,bfloat16}_linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tilewright import _native

if TYPE_CHECKING:
    from tilewright.formats.int8 import Int8Weight

_native.require()
_ops = torch.ops.tilewright


def int8_pack(weight: Int8Weight) -> Tensor:
    """The blob that `int8_linear` reads."""
    blob: Tensor = _ops.int8_pack(weight.codes, weight.scales)
    return blob


def bfloat16_pack(weight: Tensor) -> Tensor:
    """The blob that `bfloat16_linear` reads, from bfloat16 `[N, K]`."""
    blob: Tensor = _ops.bfloat16_pack(weight)
    return blob


def int8_linear(x: Tensor, blob: Tensor, out_features: int) -> Tensor:
    """`x @ weight.T` for INT8 weights in groups of 32, x rounded to 16 bits by each token's largest magnitude.

    Args:
        x: `[..., K]`, any floating type.
        blob: from `int8_pack`.
        out_features: N.

    Returns:
        `[..., N]` of x's dtype. Products of a group are exact integers; groups are added in float32. A token with a NaN
        or an infinity gives NaN.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or the blob is not a packed INT8 weight.
    """
    y: Tensor = _ops.int8_linear(x, blob, out_features)
    return y


def bfloat16_linear(x: Tensor, blob: Tensor, out_features: int) -> Tensor:
    """`x @ weight.T` for bfloat16 weights, x and sums in float32. Arguments and errors as for `int8_linear`."""
    y: Tensor = _ops.bfloat16_linear(x, blob, out_features)
    return y


def int8_rows(blob: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Dequantized rows of a packed INT8 weight: float32 `[*index.shape, K]`; no others are touched.

    Args:
        blob: from `int8_pack`.
        index: int64 `[...]`.
        shape: (N, K) of the weight.

    Raises:
        RuntimeError: an index is outside 0 .. N-1, or the blob is not a packed INT8 weight of K columns.
    """
    rows: Tensor = _ops.int8_rows(blob, index, shape[1])
    return rows


def bfloat16_rows(blob: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows of a packed bfloat16 weight: bfloat16 `[*index.shape, K]`. Arguments and errors as for `int8_rows`."""
    rows: Tensor = _ops.bfloat16_rows(blob, index, shape[1])
    return rows


@torch.library.register_fake("tilewright::int8_linear")
def _(x: Tensor, weight: Tensor, out_features: int) -> Tensor:
    del weight
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("tilewright::bfloat16_linear")
def _(x: Tensor, weight: Tensor, out_features: int) -> Tensor:
    del weight
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("tilewright::int8_rows")
def _(weight: Tensor, index: Tensor, columns: int) -> Tensor:
    del weight
    return index.new_empty((*index.shape, columns), dtype=torch.float32)


@torch.library.register_fake("tilewright::bfloat16_rows")
def _(weight: Tensor, index: Tensor, columns: int) -> Tensor:
    del weight
    return index.new_empty((*index.shape, columns), dtype=torch.bfloat16)
