# SPDX-License-Identifier: Apache-2.0
"""CrossQuant's scales (arXiv 2410.07505): D_ij = t_i^alpha c_j^(1-alpha) / Qmax, and the quantization kernel.

Notation: X [T, I] tokens by input channels (leading dimensions are flattened into T), t_i = max_j |X_ij|,
c_j = max_i |X_ij|, Qmax = 2^(bits-1) - 1. Maxima and scales are float32 (float64 for float64 input).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.quantize.crossquant.config import ALPHA, require_alpha, require_bits

MODES = ("dynamic", "static", "tight")


@dataclass(frozen=True)
class KernelProportion:
    """Share of elements that become exactly zero. all: of all elements; nonzero: of those that were not zero before;
    exact_zero: share of zeros in X itself, which are in the kernel trivially."""

    all: float
    nonzero: float
    exact_zero: float


def power(values: Tensor, exponent: float) -> Tensor:
    """values^exponent of nonnegative values with 0 -> 1 (a column or row of zeros needs any scale but 0)."""
    positive = torch.where(values > 0, values, torch.ones_like(values))
    if exponent in (0.0, 1.0):
        return positive if exponent else torch.ones_like(values)
    return positive.pow(exponent)


def column_factors(col_absmax: Tensor, alpha: float = ALPHA) -> Tensor:
    """u_j = c_j^(1-alpha) divided by its geometric mean over columns that are not always 0; those get 1.

    [I] to [I]. The division keeps diag(u) W at the magnitude of W; the row scale absorbs it exactly.

    Raises:
        ValueError: alpha is outside [0, 1], or a maximum is negative, infinite or NaN.
    """
    require_alpha("column_factors: alpha", alpha)
    return _normalised(col_absmax, alpha)[0]


def _normalised(col_absmax: Tensor, alpha: float) -> tuple[Tensor, float]:
    """(u, g): c^(1-alpha) = g u on columns with c > 0, u = 1 elsewhere."""
    if not bool((torch.isfinite(col_absmax) & (col_absmax >= 0)).all()):
        raise ValueError("col_absmax holds negative, infinite or NaN values; calibrate on finite activations")
    alive = col_absmax > 0
    u = power(col_absmax.float(), 1 - alpha)
    gain = float(u[alive].double().log().mean().exp()) if bool(alive.any()) else 1.0
    return torch.where(alive, u / gain, torch.ones_like(u)), gain


def crossquant(
    x: Tensor,
    bits: int = 8,
    alpha: float = ALPHA,
    col_absmax: Tensor | None = None,
    mode: str = "dynamic",
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales with x ~ q * row_scale * col_scale: ``(q int8 [..., I], row_scale [..., 1], col_scale [I])``.

    mode:
        "dynamic": c from x itself, as published. Nothing clips. Every code depends on all tokens at hand: neither
            causal nor invariant to the batch; a measuring instrument, and no format for generation.
        "static": c = ``col_absmax``, calibrated; codes saturate at +-Qmax where a token exceeds it.
        "tight": columns are divided by c^(1-alpha) and the row's scale is its maximum after that,
            r_i = max_j |x_ij| / c_j^(1-alpha), never above t_i^alpha while |x_ij| <= c_j. Nothing clips.
    alpha: exponent of the row; 1 is per token, and with "dynamic" 0 is per channel.

    A row of zeros has codes 0; a row that is not finite has row_scale NaN and codes 0, and does not count for c;
    ``strict`` makes it an error.

    Raises:
        ValueError: bits, alpha or mode is another; col_absmax is missing, superfluous or of a wrong shape; or strict.
    """
    require_bits("crossquant: bits", bits)
    require_alpha("crossquant: alpha", alpha)
    _check_columns(x, col_absmax, mode)
    top = 2 ** (bits - 1) - 1
    x = x if x.dtype == torch.float64 else x.float()
    finite = torch.isfinite(x).all(-1, keepdim=True)
    if strict and not bool(finite.all()):
        raise ValueError("crossquant: x holds NaN or infinite values")
    magnitude = torch.where(finite, x.abs(), torch.zeros_like(x))
    if col_absmax is None:
        rows = magnitude.reshape(-1, x.shape[-1])
        col_absmax = rows.amax(0) if len(rows) else rows.new_zeros(x.shape[-1])
    col_scale = power(col_absmax.to(x), 1 - alpha)
    if mode == "tight":
        row_scale = power((magnitude / col_scale).amax(-1, keepdim=True), 1.0) / top
    else:
        row_scale = power(magnitude.amax(-1, keepdim=True), alpha) / top
    q = torch.where(finite, x / (row_scale * col_scale), torch.zeros_like(x)).round_().clamp_(-top, top)
    return q.to(torch.int8), torch.where(finite, row_scale, torch.full_like(row_scale, torch.nan)), col_scale


def _check_columns(x: Tensor, col_absmax: Tensor | None, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"crossquant: mode={mode!r}; need one of {', '.join(map(repr, MODES))}")
    if (mode == "dynamic") != (col_absmax is None):
        need = "takes its column maxima from x; leave col_absmax out" if mode == "dynamic" else "needs col_absmax"
        raise ValueError(f"crossquant: mode={mode!r} {need}")
    if col_absmax is not None and tuple(col_absmax.shape) != (x.shape[-1],):
        raise ValueError(f"crossquant: col_absmax has shape {list(col_absmax.shape)}, [{x.shape[-1]}] is needed")


def fake_crossquant(
    x: Tensor,
    bits: int = 8,
    alpha: float = ALPHA,
    col_absmax: Tensor | None = None,
    mode: str = "dynamic",
) -> Tensor:
    """x rounded to CrossQuant's grid and back, in x's dtype; the gradient passes straight through.

    Arguments and errors as for :func:`crossquant`.
    """
    q, row_scale, col_scale = crossquant(x.detach(), bits, alpha, col_absmax, mode)
    rounded = (q.to(row_scale.dtype) * (row_scale * col_scale)).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def per_token_scale(x: Tensor, bits: int = 8) -> Tensor:
    """D_i = t_i / Qmax [..., 1]: the usual activation quantizer, and CrossQuant at alpha = 1."""
    return power(x.abs().amax(-1, keepdim=True), 1.0) / (2 ** (bits - 1) - 1)


def per_channel_scale(x: Tensor, bits: int = 8) -> Tensor:
    """D_j = c_j / Qmax [I]: CrossQuant at alpha = 0; no integer matrix product can use it unfolded."""
    return power(x.abs().reshape(-1, x.shape[-1]).amax(0), 1.0) / (2 ** (bits - 1) - 1)


def crossquant_scale(
    x: Tensor, bits: int = 8, alpha: float = ALPHA, col_absmax: Tensor | None = None, mode: str = "dynamic"
) -> Tensor:
    """The step D [..., I] that :func:`crossquant` uses."""
    _, row_scale, col_scale = crossquant(x, bits, alpha, col_absmax, mode)
    return row_scale * col_scale


def fake_quantize_with(x: Tensor, scale: Tensor) -> Tensor:
    """round(x / D) D for a step D that broadcasts to x."""
    return (x / scale).round() * scale


def in_kernel(x: Tensor, scale: Tensor) -> Tensor:
    """Bool, shape of x: whether round(x / D) is 0 (ties go to 0), for a step D that broadcasts to x."""
    return (x / scale).round() == 0


def quantization_kernel_proportion(x: Tensor, scale: Tensor) -> KernelProportion:
    """|K| / (T I) for a step D that broadcasts to x, over all elements and over those that are not exactly zero.

    Raises:
        ValueError: x is empty.
    """
    if x.numel() == 0:
        raise ValueError("quantization_kernel_proportion: x is empty")
    zero = int((x == 0).sum())
    gone = int(in_kernel(x, scale).sum())
    return KernelProportion(gone / x.numel(), (gone - zero) / max(x.numel() - zero, 1), zero / x.numel())
