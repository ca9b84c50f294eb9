# SPDX-License-Identifier: Apache-2.0
"""Ternary weights times INT8 activations in exact integers (BitNet b1.58, arXiv 2402.17764). Kernel:
csrc/ops/ternary_linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright import _native
from tilewright.formats.ternary import PackedTernary, pack_ternary

_native.require()
_ops = torch.ops.tilewright

__all__ = ["pack_ternary", "quantize_ternary_activation", "ternary_linear", "ternary_matmul"]


def ternary_matmul(x: Tensor, weight: PackedTernary) -> Tensor:
    """`x @ w.T` in exact integers: the scale of weight is not applied.

    Args:
        x: int8 `[..., K]`, all of -128 to 127.
        weight: from `pack_ternary`, on x's device.

    Returns:
        int32 `[..., N]`.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or the data are not a packed ternary weight.
    """
    y: Tensor = _ops.ternary_matmul(x, weight.data, weight.shape[0], weight.id)
    return y


def ternary_linear(
    x: Tensor,
    weight: PackedTernary,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    check_finite: bool = False,
) -> Tensor:
    """`x @ weight.T + bias` with each token of x rounded to INT8 by its largest magnitude.

    A token's scale is max(|x|, 1e-5) / 127, its codes x / scale rounded half to even; products are summed in exact
    integers and multiplied once by the product of both scales, in float32. Gradients go straight through the rounding
    of x; the packed weight has none.

    Args:
        x: `[..., K]`, any floating type.
        weight: packed `[N, K]`, from `pack_ternary`, on x's device.
        bias: `[N]` or None.
        out_dtype: of the result; that of x when None.
        check_finite: raise for a token with a NaN or an infinity; costs a synchronisation on CUDA. Without it such a
            token gives NaN and other tokens are not touched.

    Returns:
        `[..., N]`, the same bits at every thread count and instruction-set level.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or the data are not a packed ternary weight.
        ValueError: check_finite, and a token is not finite.
    """
    if check_finite and not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x).all(-1)).nonzero()[0].tolist()
        raise ValueError(f"ternary_linear: x has a NaN or an infinity in token {bad}")
    y: Tensor = _ops.ternary_linear(x, weight.data, weight.scale, bias, weight.shape[0], weight.id, out_dtype)
    return y


def quantize_ternary_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token of x `[..., K]` as `ternary_linear` does: `(codes int8 [..., K], scale float32 [...])`.

    x ~ codes * scale. A token that is not finite has scale NaN and codes 0.
    """
    codes, scale = _ops.ternary_quantize(x)
    return codes, scale


@torch.library.register_fake("tilewright::ternary_unpack")
def _(data: Tensor, rows: int, cols: int, packing: int) -> Tensor:
    return data.new_empty((rows, cols), dtype=torch.int8)


@torch.library.register_fake("tilewright::ternary_quantize")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("tilewright::ternary_matmul")
def _(x: Tensor, data: Tensor, out_features: int, packing: int) -> Tensor:
    torch._check(x.dtype == torch.int8, lambda: "ternary_matmul: x must be int8")
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.int32)


@torch.library.register_fake("tilewright::ternary_linear")
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    packing: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if bias is not None:
        torch._check(bias.dim() == 1 and bias.shape[0] == out_features, lambda: "bias must be [N]")
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, data, scale, bias, out_features, packing, _ = inputs
    ctx.save_for_backward(data, scale)
    ctx.packing, ctx.shape, ctx.dtype = packing, (out_features, x.shape[-1]), x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    data, scale = ctx.saved_tensors
    d_x = d_bias = None
    if ctx.needs_input_grad[0]:
        values = _ops.ternary_unpack(data, *ctx.shape, ctx.packing)
        wide = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        weight = values.to(wide) * scale.to(wide).reshape(-1, 1)
        d_x = (grad.to(wide) @ weight).to(ctx.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        d_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return d_x, None, None, d_bias, None, None, None


torch.library.register_autograd("tilewright::ternary_linear", _linear_backward, setup_context=_linear_context)
