# SPDX-License-Identifier: Apache-2.0
"""The element-wise units, one row (token) a frame: norm, quantization, dequantization, rotation, gate, residual."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract import tables
from tilewright.edge.contract.half import (
    Half,
    Int,
    align,
    as_half,
    magnitude_bits,
    pack,
    shift_right_even,
    split,
    split_bits,
)
from tilewright.edge.contract.scale import Factor
from tilewright.edge.contract.status import Status, StatusRegister
from tilewright.edge.contract.weights import Int8, Int32

MIN_SCALE_BITS = 0x00A8
"""float16 of 1e-5: a row's maximum counts as at least this."""
MAX_WIDTH = 1 << 14
NORM_BITS = 17
NORM_FLOOR = -18
"""Rows smaller than 2**-7 are summed in the place of float16's last one, where they are exact."""
ROPE_BITS = 26
ACC_LIMIT = (1 << 26) - 1


@dataclass(frozen=True)
class NormConstants:
    """What RMS-MAX needs besides the weights.

    Attributes:
        width: values in a row, 1 to 2**14.
        eps: round(eps * width * 2**48), below 2**47.
    """

    width: int
    eps: int

    @classmethod
    def of(cls, width: int, eps: float) -> NormConstants:
        """Raises ValueError when the row is too wide or eps too large for the accumulator."""
        if not 1 <= width <= MAX_WIDTH:
            raise ValueError(f"NormConstants: width = {width}, needed 1 to {MAX_WIDTH}")
        constant = round(math.ldexp(eps * width, 48)) if math.isfinite(eps) else -1
        if not 0 <= constant < 1 << 47:
            raise ValueError(
                f"NormConstants: eps = {eps} with width {width}, needed eps * width below 0.5 and not negative"
            )
        return cls(width, constant)


def inverse_root(total: int, width: int) -> tuple[int, int]:
    """(r, k) with r = floor(sqrt(floor(width * 2**k / total))), k even and the least with 2**16 <= r; r < 2**17.

    So r * 2**(-k/2) is sqrt(width / total) to 16 bits. A restoring division and a restoring square root in hardware.
    """
    k = 32 + total.bit_length() - width.bit_length() - 1
    k += k & 1
    while width << k < total << 32:
        k += 2
    return math.isqrt((width << k) // total), k


def rms_max(
    x: Half, weight: Half, constants: NormConstants, status: StatusRegister | None = None
) -> tuple[Half, NDArray[np.int64]]:
    """RMS norm and the largest magnitude of what it puts out.

    Args:
        x: float16 `[tokens, width]`. weight: float16 `[width]`.

    Returns:
        float16 `[tokens, width]`, and the bits of each row's largest magnitude, `[tokens]`.
    """
    x, weight = as_half(x, "x"), as_half(weight, "weight")
    if x.ndim != 2 or x.shape[1] != constants.width or weight.shape != (constants.width,):
        raise ValueError(
            f"rms_max: x is {x.shape} and weight {weight.shape}, needed [tokens, {constants.width}] and its row"
        )
    integers, top = align(x, NORM_BITS, status, NORM_FLOOR)
    totals = (integers * integers).sum(-1) + (constants.eps >> (2 * (top - NORM_FLOOR)))
    roots = [inverse_root(max(int(total), 1), constants.width) for total in totals]
    root = np.array([r for r, _ in roots], np.int64).reshape(-1)
    shift = np.array([k // 2 for _, k in roots], np.int64).reshape(-1)
    mx, ex = split(x)
    mw, ew = split(weight, status)
    exponent = ex + ew + ((NORM_BITS - 11) - top - shift)[:, None]
    y = pack(mx * mw * root[:, None], exponent, status)
    return y, row_max(y)


def row_max(x: Half, status: StatusRegister | None = None) -> Int:
    """Bits of each row's largest magnitude: what a row without a norm brings to the quantizer."""
    return magnitude_bits(as_half(x, "x"), status).max(-1, initial=0)


def quantize(x: Half, largest: Int, status: StatusRegister | None = None) -> tuple[Int8, Int]:
    """127 x / s rounded to the nearest integer, ties to even, exactly; s is the row's largest magnitude, at least 1e-5.

    Returns:
        int8 `[tokens, width]` in -127 .. 127, and the bits of s, `[tokens]`.
    """
    bits = magnitude_bits(as_half(x, "x"), status)
    scale = np.maximum(np.asarray(largest, np.int64), MIN_SCALE_BITS)
    ms, es = (part[:, None] for part in split_bits(scale))
    reciprocal = ((127 << 24) + ms - 1) // ms
    m, e = split_bits(bits)
    # The reciprocal is too large by less than 2**-24: what that adds to a product is below 2**11, and no quotient that
    # is not a tie comes as near to one. So 11 bits fewer make the ties exact.
    value = shift_right_even(m * reciprocal >> 11, np.maximum(13 + es - e, 0))
    over = bits > scale[:, None]
    if status is not None:
        status.set(Status.QUANT_CLAMP, over.any())
    value = np.where(over, 127, value)
    negative = np.ascontiguousarray(x).view(np.uint16) >> 15 == 1
    return np.where(negative, -value, value).astype(np.int8), scale


def row_factor(scale: int, weight_scale: Factor) -> Factor:
    """s * (gamma / 127) of a row, 17 bits, nearest, ties to even; ``scale`` is bits of s."""
    mantissa, exponent = split_bits(np.asarray(scale, np.int64))
    return Factor.normal(int(mantissa) * weight_scale.mantissa, int(exponent) + weight_scale.exponent)


def dequantize(acc: Int32, scale: Int, weight_scale: Factor, status: StatusRegister | None = None) -> Half:
    """int32 `[tokens, outputs]` times its row's factor, rounded once to float16."""
    wide = np.asarray(acc, np.int64)
    if status is not None:
        status.set(Status.ACC_CLAMP, (np.abs(wide) > ACC_LIMIT).any())
    factors = [row_factor(int(s), weight_scale) for s in np.asarray(scale).reshape(-1)]
    mantissa = np.array([f.mantissa for f in factors], np.int64).reshape(-1, 1)
    exponent = np.array([f.exponent for f in factors], np.int64).reshape(-1, 1)
    return pack(np.clip(wide, -ACC_LIMIT, ACC_LIMIT) * mantissa, exponent, status)


def residual_add(a: Half, b: Half, status: StatusRegister | None = None) -> Half:
    """a + b rounded once to float16."""
    (ma, ea), (mb, eb) = split(as_half(a, "a"), status), split(as_half(b, "b"), status)
    low = np.minimum(ea, eb)
    return pack((ma << (ea - low)) + (mb << (eb - low)), low, status)


def silu_multiply(gate: Half, up: Half, status: StatusRegister | None = None) -> Half:
    """gate * sigmoid(gate) * up rounded once to float16, the sigmoid from its table."""
    (mg, eg), (mu, eu) = split(as_half(gate, "gate"), status), split(as_half(up, "up"), status)
    return pack(mg * mu * tables.sigmoid(mg, eg), eg + eu - 16, status)


def squared_relu_multiply(gate: Half, up: Half, status: StatusRegister | None = None) -> Half:
    """max(gate, 0)**2 * up rounded once to float16."""
    (mg, eg), (mu, eu) = split(as_half(gate, "gate"), status), split(as_half(up, "up"), status)
    positive = np.maximum(mg, 0)
    return pack(positive * positive * mu, 2 * eg + eu, status)


def rope_table(positions: int, head_size: int, base: float = 10000.0) -> NDArray[np.int16]:
    """int16 `[positions, head_size / 2, 2]`: cosine and sine times 2**14, to the nearest."""
    if head_size % 2:
        raise ValueError(f"rope_table: head_size = {head_size}, needed an even number")
    angles = np.arange(positions)[:, None] * base ** (-np.arange(0, head_size, 2) / head_size)
    return np.rint(np.stack([np.cos(angles), np.sin(angles)], -1) * 2.0**14).astype(np.int16)


def rope_order(head_size: int) -> Int:
    """Row order that makes the pairs (t, t + head_size / 2) of a head neighbours: apply it to W_q's and W_k's rows."""
    half = head_size // 2
    return np.stack([np.arange(half), np.arange(half) + half], -1).reshape(-1)


def rope(x: Half, angles: NDArray[np.int16], status: StatusRegister | None = None) -> Half:
    """Rotate neighbouring pairs.

    Args:
        x: float16 `[tokens, heads, head_size]`. angles: int16 `[tokens, head_size / 2, 2]` of :func:`rope_table`.
    """
    pairs = as_half(x, "x").reshape(*x.shape[:-1], -1, 2)
    a, top = align(pairs, ROPE_BITS, status)
    cosine, sine = (angles[:, None, :, i].astype(np.int64) for i in (0, 1))
    exponent = top - (ROPE_BITS - 11) - 14
    first = pack(a[..., 0] * cosine - a[..., 1] * sine, exponent, status)
    second = pack(a[..., 1] * cosine + a[..., 0] * sine, exponent, status)
    return np.stack([first, second], -1).reshape(x.shape)


FUSE_MODES = ("bypass", "residual", "rope", "silu", "squared_relu")
"""What can follow the dequantizer, by number."""


def dequant_fuse(
    acc: Int32,
    scale: Int,
    weight_scale: Factor,
    mode: str = "bypass",
    side: NDArray[Any] | None = None,
    status: StatusRegister | None = None,
) -> Half:
    """:func:`dequantize`, then one of :data:`FUSE_MODES`.

    Args:
        side: the residual, float16 of the result's shape; for "rope" the angles, int16 `[tokens, head_size / 2, 2]`;
            for "silu" and "squared_relu" the gate, the accumulators being up's.

    Raises:
        ValueError: the mode is unknown or comes without what it needs.
    """
    y = dequantize(acc, scale, weight_scale, status)
    if mode not in FUSE_MODES or (mode == "bypass") != (side is None):
        raise ValueError(
            f"dequant_fuse: mode = {mode!r} with side {type(side).__name__}, needed one of {FUSE_MODES} and its side"
        )
    if side is None:
        return y
    if mode == "rope":
        return rope(y.reshape(len(y), -1, 2 * side.shape[1]), side, status).reshape(y.shape)
    if side.shape != y.shape:
        raise ValueError(f"dequant_fuse: side has shape {side.shape}, needed {y.shape}")
    if mode == "residual":
        return residual_add(side, y, status)
    return (silu_multiply if mode == "silu" else squared_relu_multiply)(side, y, status)
