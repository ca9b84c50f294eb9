# SPDX-License-Identifier: Apache-2.0
"""Matrices in INT8 and bfloat16 as layers, and embeddings: output heads, and linears that are not INT4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tilewright.formats.int4 import Int4Weight
from tilewright.formats.int8 import Int8Weight
from tilewright.formats.ternary import PackedTernary
from tilewright.ops import dense_linear


class _PackedLinear(nn.Module):
    """``y = x W^T + b`` over a packed matrix (buffer ``packed``, uint8), the only copy of W."""

    packed: Tensor

    def __init__(self, packed: Tensor, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__()
        if bias is not None and tuple(bias.shape) != (shape[0],):
            raise ValueError(f"{type(self).__name__}: bias has shape {list(bias.shape)}, needed [{shape[0]}]")
        self.out_features, self.in_features = shape
        self.register_buffer("packed", packed)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] of any floating dtype to [..., N] of the same dtype."""
        y = self._product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of W: [*index.shape, K]."""
        raise NotImplementedError

    def _product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(_PackedLinear):
    """``y = x W^T + b`` with W in INT8 groups of 32 and x rounded to 16 bits (:func:`tilewright.ops.dense_linear`).

    Args:
        weight: Int8Weight [N, K].
        bias: float [N] or None.

    Raises:
        ValueError: bias has another shape.
    """

    def __init__(self, weight: Int8Weight, bias: Tensor | None = None) -> None:
        super().__init__(dense_linear.int8_pack(weight), weight.shape, bias)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return dense_linear.int8_rows(self.packed, index, (self.out_features, self.in_features)).to(dtype)

    def _product(self, x: Tensor) -> Tensor:
        return dense_linear.int8_linear(x, self.packed, self.out_features)


class BFloat16Linear(_PackedLinear):
    """``y = x W^T + b`` with W in bfloat16, x and all sums in float32.

    Args:
        weight: float [N, K], rounded to bfloat16.
        bias: float [N] or None.

    Raises:
        ValueError: bias has another shape.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        packed = dense_linear.bfloat16_pack(weight.detach().to(torch.bfloat16))
        super().__init__(packed, (weight.shape[0], weight.shape[1]), bias)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return dense_linear.bfloat16_rows(self.packed, index, (self.out_features, self.in_features)).to(dtype)

    def _product(self, x: Tensor) -> Tensor:
        return dense_linear.bfloat16_linear(x, self.packed, self.out_features)


class PackedEmbedding(nn.Module):
    """Token ids to rows of a packed matrix, which an output head may share: one copy serves both.

    Args:
        matrix: the layer that holds the matrix [vocabulary, K].
        dtype: of the rows given out.
    """

    def __init__(self, matrix: Int8Linear | BFloat16Linear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] to [..., K]."""
        return self.matrix.rows(tokens, self.dtype)


class Int4Embedding(nn.Module):
    """Token ids to dequantized rows of an INT4 matrix in its canonical form.

    Args:
        weight: Int4Weight [vocabulary, K].
        dtype: of the rows given out.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(self, weight: Int4Weight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, dtype
        self.group_size, self.per_tensor_scale = weight.group_size, weight.per_tensor_scale
        for name in ("codes", "scales", "offsets"):
            self.register_buffer(name, getattr(weight, name))

    def _apply(self, fn: Any, recurse: bool = True) -> Int4Embedding:
        """Moves follow the module; scales keep their dtype, which is part of the format."""
        dtypes = {name: b.dtype for name, b in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            setattr(self, name, getattr(self, name).to(dtype))
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] to [..., K]."""
        flat = tokens.reshape(-1)
        rows = Int4Weight(
            self.codes[flat],
            self.scales[flat],
            None if self.offsets is None else self.offsets[flat],
            (flat.numel(), self.shape[1]),
            self.group_size,
            self.per_tensor_scale,
        )
        return rows.dequantize(self.dtype).view(*tokens.shape, self.shape[1])


class TernaryEmbedding(nn.Module):
    """Token ids to rows of a ternary matrix, held as int8 values and their scale.

    Args:
        weight: PackedTernary [vocabulary, K].
        dtype: of the rows given out.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, weight: PackedTernary, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("values", weight.unpack())
        self.register_buffer("scale", weight.scale.float())

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] to [..., K]."""
        scale = self.scale if self.scale.numel() == 1 else self.scale[tokens][..., None]
        return (self.values[tokens].to(torch.float32) * scale).to(self.dtype)
