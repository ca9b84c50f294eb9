# SPDX-License-Identifier: Apache-2.0
"""float16 to integers and back: the only places where the accelerator reads or rounds a float16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract.status import Status, StatusRegister

Int = NDArray[np.int64]
Half = NDArray[np.float16]

MANTISSA_BITS = 11
MIN_EXPONENT = -24
"""Of the last place of a subnormal; a normal's last place is at its exponent field minus 25."""
MAX_EXPONENT = 5
MAX_BITS = 0x7BFF
_INFINITY = 0x7C00


def as_half(x: object, name: str) -> Half:
    """``x`` as a float16 array.

    Raises:
        ValueError: it has another dtype; the contract rounds only where it says so.
    """
    array = np.asarray(x)
    if array.dtype != np.float16:
        raise ValueError(f"{name} has dtype {array.dtype}, needed float16: round it yourself with .astype(np.float16)")
    return array


def magnitude_bits(x: Half, status: StatusRegister | None = None) -> Int:
    """Bits of |x| (int64), which order as the magnitudes do; NaN as 0, infinity as 65504."""
    bits = np.ascontiguousarray(x).view(np.uint16).astype(np.int64) & 0x7FFF
    wild = bits >= _INFINITY
    if status is not None:
        status.set(Status.NONFINITE, wild.any())
    return np.where(bits > _INFINITY, 0, np.minimum(bits, MAX_BITS))


def split_bits(bits: Int) -> tuple[Int, Int]:
    """(mantissa, exponent) of a finite magnitude: its value is mantissa * 2**exponent, 0 <= mantissa < 2**11."""
    field = bits >> 10
    fraction = bits & 0x3FF
    return np.where(field > 0, fraction + 1024, fraction), np.maximum(field, 1) - 25


def split(x: Half, status: StatusRegister | None = None) -> tuple[Int, Int]:
    """(signed mantissa, exponent), int64: x = mantissa * 2**exponent."""
    mantissa, exponent = split_bits(magnitude_bits(x, status))
    negative = np.ascontiguousarray(x).view(np.uint16) >> 15
    return np.where(negative == 1, -mantissa, mantissa), exponent


def bit_length(value: Int) -> Int:
    """Number of bits of a non-negative int64 below 2**62."""
    length = np.frexp(value.astype(np.float64))[1].astype(np.int64)
    # The conversion may have rounded up to a power of two.
    return np.where((length > 0) & (value >> np.maximum(length - 1, 0) == 0), length - 1, length)


def shift_right_even(value: Int, shift: Int) -> Int:
    """value / 2**shift rounded to the nearest integer, ties to even; value >= 0, any shift >= 0."""
    shift = np.minimum(shift, 62)
    floor = value >> shift
    rest = value - (floor << shift)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), np.int64(1) << 62)
    return floor + ((rest > half) | ((rest == half) & (floor & 1 == 1)))


def pack(value: Int, exponent: Int | int, status: StatusRegister | None = None) -> Half:
    """value * 2**exponent rounded once to float16: nearest, ties to even, subnormals kept.

    Beyond 65504 after rounding it becomes 65504 of its sign and sets SATURATED. Zero is +0. ``|value| < 2**62``.
    """
    value = np.asarray(value, np.int64)
    magnitude = np.abs(value)
    exponent = np.broadcast_to(np.asarray(exponent, np.int64), magnitude.shape)
    place = np.maximum(bit_length(magnitude) - MANTISSA_BITS + exponent, MIN_EXPONENT)
    shift = place - exponent
    left = magnitude << np.clip(-shift, 0, MANTISSA_BITS)
    rounded = np.where(shift > 0, shift_right_even(magnitude, np.maximum(shift, 0)), left)
    # A carry out of the mantissa moves into the exponent field by itself.
    bits = np.where(rounded < 1024, rounded, ((np.minimum(place, 100) + 25) << 10) + rounded - 1024)
    over = bits > MAX_BITS
    if status is not None:
        status.set(Status.SATURATED, over.any())
    bits = np.where(over, MAX_BITS, bits)
    bits |= np.where((value < 0) & (bits > 0), 0x8000, 0)
    return bits.astype(np.uint16).view(np.float16)


def align(x: Half, width: int, status: StatusRegister | None = None, floor: int = MIN_EXPONENT) -> tuple[Int, Int]:
    """Integers with one exponent for the whole last axis: x ~ a * 2**(top - (width - 11)), |a| < 2**width.

    ``top`` is the largest exponent on the axis, at least ``floor``. Bits below the last place are dropped,
    toward zero, so |x - a * 2**(top - (width - 11))| < 2**(top - (width - 11)).

    Returns:
        a, shape of x; top, shape of x without its last axis.
    """
    mantissa, exponent = split(x, status)
    top = np.maximum(exponent.max(-1, initial=MIN_EXPONENT), floor)
    magnitude = (np.abs(mantissa) << (width - MANTISSA_BITS)) >> (top[..., None] - exponent)
    return np.where(mantissa < 0, -magnitude, magnitude), top
