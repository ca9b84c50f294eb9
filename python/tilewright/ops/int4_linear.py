# SPDX-License-Identifier: Apache-2.0
"""INT4 weights times INT8 or FP8 activations (FireQ, arXiv 2505.20839). Kernel: csrc/ops/int4_linear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tilewright.formats.int4 import PackedInt4

_ops = torch.ops.tilewright

_TILE_COLUMNS = 128  # of a chunk of csrc/format/int4_hopper.h
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
    if x.is_cuda or weight.layout != 0:
        raise RuntimeError(
            "int4_int8_linear: INT8 activations are for the CPU; on a CUDA device use int4_fp8_linear "
            "(W4A8Linear with act='fp8'), or move x and the weight with .to('cpu')"
        )
    y = _ops.int4_int8_linear(x, weight.data, bias, weight.shape[0], scale_group or 0)
    return y if out_dtype is None else y.to(out_dtype)


def int4_fp8_linear(
    x: Tensor | Fp8Tokens,
    weight: PackedInt4,
    bias: Tensor | None = None,
    *,
    mode: Literal["exact", "fold"] = "exact",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with each token of x quantized to FP8 e4m3 by its largest magnitude.

    Args:
        x: `[..., K]`, any floating type; on a CUDA device also `Fp8Tokens`, rounded before for several layers.
        weight: packed `[N, K]`, from `Int4Weight.pack()`, on the device of x (`PackedInt4.to`).
        bias: `[N]` or None.
        mode: "exact" multiplies integers and applies group scales to partial sums; "fold" first rounds each weight to
            e4m3(q * scale), as the paper's FP8 x FP8 kernel does. Fold needs a symmetric weight.
        residual: of the result's shape, added to it; on a CUDA device by the same kernel, before the result is rounded.
        out_dtype: of the result; that of x when None.

    Returns:
        `[..., N]`, sums in float32. On a CUDA device the matrix unit adds the products of up to 128 columns in a
        shorter sum of its own, about 14 bits, before float32 takes over.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or the blob is not a packed INT4 weight.
        ValueError: mode is neither word.
    """
    if mode not in ("exact", "fold"):
        raise ValueError(f"int4_fp8_linear: mode = {mode!r}, needed 'exact' or 'fold'")
    if isinstance(x, Fp8Tokens):
        y = x.data.new_empty((x.data.shape[0], weight.shape[0]), dtype=out_dtype or x.dtype)
        flat = None if residual is None else residual.reshape(y.shape)
        _ops.int4_fp8_linear_quantized(
            x.data, x.scales, x.sums, weight.data, bias, weight.shape[1], mode == "fold", weight.layout, y, flat
        )
        return y.view(*x.shape[:-1], weight.shape[0])
    if weight.layout == 0:
        y = _ops.int4_fp8_linear(x, weight.data, bias, weight.shape[0], mode == "fold")
        y = y if residual is None else y + residual
    else:
        y = _ops.int4_fp8_linear(x, weight.data, bias, weight.shape[0], mode == "fold", weight.layout, residual)
    return y if out_dtype is None else y.to(out_dtype)


@dataclass(frozen=True)
class Fp8Tokens:
    """Tokens rounded to e4m3 on a CUDA device, as its products read them: made once, used by several layers.

    Attributes:
        data: uint8 `[M, K rounded up to 128]`, the bits of e4m3.
        scales: float32 `[M]`.
        sums: float32, of neighbouring codes, which weights with minima, zero points or codes of -8 need; else empty.
        shape: of x, `[..., K]`.
        dtype: of x.
    """

    data: Tensor
    scales: Tensor
    sums: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype


def fp8_tokens(
    x: Tensor,
    weight: PackedInt4,
    *,
    gate: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Fp8Tokens:
    """Round each token of x `[..., K]`, on a CUDA device, for `int4_fp8_linear` with that weight or others like it.

    What comes between two layers can be done on the way, in float32, instead of in a kernel of its own:

    Args:
        x: `[..., K]`, any floating type.
        weight: of the layer that follows, or one with the same group and kind.
        gate: of x's shape; `x * silu(gate)` is rounded, as in a gated MLP.
        norm: `[K]`; `x / sqrt(mean(x^2) + eps) * norm` is rounded (RMSNorm), before the gate if both are given.
        eps: of the norm.

    Raises:
        RuntimeError: x is not floating or not on a CUDA device, or a shape does not fit.
    """
    data, scales, sums = _ops.fp8_quantize_tokens(x, _columns_of_a_sum(weight), gate, norm, eps)
    return Fp8Tokens(data, scales, sums, tuple(x.shape), x.dtype)


def _columns_of_a_sum(weight: PackedInt4) -> int:
    """How many columns share a scale in the CUDA layout, or 0 where its kernels need no sums of codes."""
    signed, group = weight.layout >> 5 & 1, weight.layout >> 8
    if signed or weight.layout == 0:
        return 0
    return _TILE_COLUMNS if group >= weight.shape[1] else math.gcd(group, _TILE_COLUMNS)


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
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    fold: bool,
    layout: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    return _fake_linear(x, bias, out_features)


@torch.library.register_fake("tilewright::fp8_quantize_tokens")
def _(
    x: Tensor, sub: int, gate: Tensor | None = None, norm: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.numel() // x.shape[-1]
    padded = (x.shape[-1] + _TILE_COLUMNS - 1) // _TILE_COLUMNS * _TILE_COLUMNS
    sums = (padded // sub, (tokens + 127) // 128 * 128) if sub else (0, 0)
    return (
        x.new_empty((tokens, padded), dtype=torch.uint8),
        x.new_empty((tokens,), dtype=torch.float32),
        x.new_empty(sums, dtype=torch.float32),
    )


@torch.library.register_fake("tilewright::int4_fp8_linear_quantized")
def _(
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_features: int,
    fold: bool,
    layout: int,
    y: Tensor,
    residual: Tensor | None = None,
) -> None:
    torch._check(y.dim() == 2 and y.shape[0] == codes.shape[0], lambda: "y must be [M, N]")
