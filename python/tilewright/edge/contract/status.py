# SPDX-License-Identifier: Apache-2.0
"""Sticky status: what went wrong since the register was last cleared. Bits are set, never cleared by a unit."""

from __future__ import annotations

from enum import IntFlag


class Status(IntFlag):
    """Bits of the status register. A run whose register stays 0 met no exceptional value and no broken protocol."""

    NONFINITE = 1 << 0
    """A NaN (taken as 0) or an infinity (taken as the largest finite value of its sign) came in."""
    SATURATED = 1 << 1
    """A float16 result was beyond 65504 and was clamped to it."""
    BAD_INDEX = 1 << 2
    """A weight index of 3**G or more was loaded; it reads 0 from every table."""
    QUANT_CLAMP = 1 << 3
    """An activation larger than its row's maximum came to the quantizer."""
    ACC_CLAMP = 1 << 4
    """An accumulator outside +-(2**26 - 1) came to the dequantizer."""
    SCORE_CLAMP = 1 << 5
    """An attention score was outside the range of its fixed-point form."""
    SHORT_FRAME = 1 << 6
    """A row ended before its length."""
    LONG_FRAME = 1 << 7
    """A row went on past its length."""
    BUS_ERROR = 1 << 8
    """External memory answered with an error."""
    BAD_DESCRIPTOR = 1 << 9
    """A descriptor asked for something the build cannot do."""


class StatusRegister:
    """Collects :class:`Status` bits from the functions it is handed to."""

    def __init__(self) -> None:
        self.value = Status(0)

    def set(self, bit: Status, when: object = True) -> None:
        """Set ``bit`` if ``when`` is true."""
        if when:
            self.value |= bit
