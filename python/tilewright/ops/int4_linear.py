# SPDX-License-Identifier: Apache-2.0
"""INT4 weights times INT8 or FP8 activations (FireQ, arXiv 2505.20839). Kernel: csrc/ops/int4_linear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tilewright.formats.int4 import PackedInt4

_ops = torch.ops.tilewright

FP8_MAX = 448.0
INT8_MAX = 127.0


def int4_int8_linear(
    x: Tensor,
    weight: PackedInt4,
    bias: Tensor | None = None,
    *,
    scale_group: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with x quantized to INT8 by the largest magnitude of each token, or of each group of it.

    Args:
        x: `[..., K]`, any floating type.
        weight: packed `[N, K]`, from `Int4Weight.pack()`.
        bias: `[N]` or None.
        scale_group: columns of x that share a scale, a multiple of the weight's group; None is one scale a token. A
            group of 64 or so keeps a token with a few large values accurate.
        out_dtype: of the result; that of x when None.

    Returns:
        `[..., N]`. Products of a group are exact integers; groups are added in float32. A token with a NaN or an
        infinity gives NaN, other tokens are not touched.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or the blob is not a packed INT4 weight.
    """
    y = _ops.int4_int8_linear(x, weight.data, bias, weight.shape[0], scale_group or 0)
    return y if out_dtype is None else y.to(out_dtype)


def int4_fp8_linear(
    x: Tensor,
    weight: PackedInt4,
    bias: Tensor | None = None,
    *,
    mode: Literal["exact", "fold"] = "exact",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with each token of x quantized to FP8 e4m3 by its largest magnitude.

    Args:
        x: `[..., K]`, any floating type.
        weight: packed `[N, K]`, from `Int4Weight.pack()`.
        bias: `[N]` or None.
        mode: "exact" multiplies integers and applies group scales to partial sums; "fold" first rounds each weight to
            e4m3(q * scale), as the paper's FP8 x FP8 kernel does. Fold needs a symmetric weight.
        out_dtype: of the result; that of x when None.

    Returns:
        `[..., N]`, sums in float32.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or the blob is not a packed INT4 weight.
        ValueError: mode is neither word.
    """
    if mode not in ("exact", "fold"):
        raise ValueError(f"int4_fp8_linear: mode = {mode!r}, needed 'exact' or 'fold'")
    y = _ops.int4_fp8_linear(x, weight.data, bias, weight.shape[0], mode == "fold")
    return y if out_dtype is None else y.to(out_dtype)


def _token_scale(x: Tensor, limit: float) -> Tensor:
    scale = x.abs().amax(-1) / limit
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.where(torch.isfinite(x).all(-1), scale, torch.full_like(scale, torch.nan))


def quantize_int8_per_token(x: Tensor, scale_group: int | None = None) -> tuple[Tensor, Tensor]:
    """Round each token of x `[..., K]` to INT8: `(codes int8 [..., K], scale float32 [...])`, x ~ codes * scale.

    The scale is absmax / 127, 1 for an all-zero token, and NaN (with codes 0) for a token that is not finite: the same
    definition as inside `int4_int8_linear`. With scale_group the scales are `[..., ceil(K / scale_group)]`.
    """
    x = x.float()
    if scale_group is None:
        scale = _token_scale(x, INT8_MAX)
        divisor = scale[..., None]
    else:
        pieces = x.split(scale_group, dim=-1)
        scale = torch.stack([_token_scale(piece, INT8_MAX) for piece in pieces], dim=-1)
        scale = torch.where(torch.isfinite(x).all(-1, keepdim=True), scale, torch.full_like(scale, torch.nan))
        divisor = scale.repeat_interleave(scale_group, dim=-1)[..., : x.shape[-1]]
    codes = torch.where(divisor.isnan(), torch.zeros_like(x), (x / divisor).round())
    return codes.to(torch.int8), scale


def quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token of x `[..., K]` to e4m3: `(codes float8_e4m3fn [..., K], scale float32 [...])`.

    The scale is absmax / 448, 1 for an all-zero token, and NaN (with codes 0) for a token that is not finite: the same
    definition as inside `int4_fp8_linear`.
    """
    x = x.float()
    scale = _token_scale(x, FP8_MAX)
    codes = torch.where(scale.isnan()[..., None], torch.zeros_like(x), x / scale[..., None])
    return codes.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def _fake_linear(x: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    if bias is not None:
        torch._check(bias.dim() == 1 and bias.shape[0] == out_features, lambda: "bias must be [N]")
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("tilewright::int4_int8_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, scale_group: int = 0) -> Tensor:
    return _fake_linear(x, bias, out_features)


@torch.library.register_fake("tilewright::int4_fp8_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, fold: bool) -> Tensor:
    return _fake_linear(x, bias, out_features)
