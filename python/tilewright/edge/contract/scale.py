# SPDX-License-Identifier: Apache-2.0
"""Constants and factors as a 17-bit mantissa and an exponent."""

from __future__ import annotations

import math
from dataclasses import dataclass

BITS = 17


@dataclass(frozen=True)
class Factor:
    """mantissa * 2**exponent with 2**16 <= mantissa < 2**17."""

    mantissa: int
    exponent: int

    def __float__(self) -> float:
        return math.ldexp(self.mantissa, self.exponent)

    @classmethod
    def of(cls, value: float) -> Factor:
        """The nearest factor to a positive number, ties to even; done when a model is compiled, never in hardware.

        Raises:
            ValueError: value is not positive, not finite, or outside 2**-100 .. 2**100.
        """
        if not (math.isfinite(value) and 2.0**-100 <= value <= 2.0**100):
            raise ValueError(f"Factor: value = {value}, needed a number between 2**-100 and 2**100")
        fraction, exponent = math.frexp(value)
        return cls.normal(round(math.ldexp(fraction, 53)), exponent - 53)

    @classmethod
    def normal(cls, value: int, exponent: int) -> Factor:
        """value * 2**exponent rounded to 17 bits, nearest, ties to even; value > 0."""
        shift = value.bit_length() - BITS
        if shift <= 0:
            return cls(value << -shift, exponent + shift)
        floor, rest = value >> shift, value & ((1 << shift) - 1)
        half = 1 << (shift - 1)
        floor += rest > half or (rest == half and floor & 1 == 1)
        if floor >> BITS:
            floor, shift = floor >> 1, shift + 1
        return cls(floor, exponent + shift)
