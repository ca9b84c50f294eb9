# SPDX-License-Identifier: Apache-2.0
"""The two tables of the accelerator, and the interpolation between their entries."""

from __future__ import annotations

import math

import numpy as np

from tilewright.edge.contract.half import Int

EXP2_INDEX_BITS = 7
EXP2_FRACTION_BITS = 14
EXP2 = tuple(round(2.0 ** (15 + i / 128)) for i in range(129))
"""2**15 * 2**(i / 128); the last entry serves only as the end of the last interval."""

SIGMOID_INDEX_BITS = 9
SIGMOID_FRACTION_BITS = 14
SIGMOID = tuple(round(2.0**16 / (1 + math.exp(-i / 32))) for i in range(513))
"""2**16 * sigmoid(i / 32) on [0, 16]."""


def _interpolate(table: tuple[int, ...], at: Int, bits: int) -> Int:
    entries = np.array(table, np.int64)
    index, rest = at >> bits, at & ((1 << bits) - 1)
    return entries[index] + ((entries[index + 1] - entries[index]) * rest >> bits)


def exp2_fraction(f: Int) -> Int:
    """2**15 * 2**(f / 2**14) for 0 <= f < 2**14: 16 bits, in [2**15, 2**16)."""
    return _interpolate(EXP2, f, EXP2_FRACTION_BITS - EXP2_INDEX_BITS)


def sigmoid(mantissa: Int, exponent: Int) -> Int:
    """2**16 * sigmoid(mantissa * 2**exponent), 17 bits, in [0, 2**16]; within 3.4 of the true value."""
    magnitude = np.abs(mantissa)
    shift = exponent + SIGMOID_FRACTION_BITS
    z = np.where(shift >= 0, magnitude << np.maximum(shift, 0), magnitude >> np.maximum(-shift, 0))
    z = np.minimum(z, (1 << (SIGMOID_INDEX_BITS + 9)) - 1)
    positive = _interpolate(SIGMOID, z, 9)
    return np.where(mantissa < 0, (1 << 16) - positive, positive)
