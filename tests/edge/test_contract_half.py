# SPDX-License-Identifier: Apache-2.0
"""Reading, rounding and aligning float16, against numpy's float16 and exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.edge.contract import Factor, Status, StatusRegister, half, tables


def test_every_finite_value_survives() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = bits.view(np.float16)
    finite = np.isfinite(x)
    mantissa, exponent = half.split(x)
    back = half.pack(mantissa, exponent)
    expected = np.where(bits == 0x8000, 0, bits)
    assert np.array_equal(back.view(np.uint16)[finite], expected[finite])
    assert (back.view(np.uint16)[np.isnan(x)] == 0).all()
    assert back[x == np.inf] == 65504
    assert back[x == -np.inf] == -65504


def test_exceptional_values_are_reported() -> None:
    for value, bit in ((np.nan, Status.NONFINITE), (np.inf, Status.NONFINITE), (65504.0, Status(0))):
        status = StatusRegister()
        half.split(np.array([value], np.float16), status)
        assert status.value == bit


@settings(max_examples=300, deadline=None)
@given(st.integers(-(2**61), 2**61), st.integers(-120, 20))
def test_pack_is_one_rounding(value: int, exponent: int) -> None:
    status = StatusRegister()
    got = half.pack(np.array([value]), exponent, status)[0]
    exact = Fraction(value) * Fraction(2) ** exponent
    # The nearest multiple of the place, ties to even: Fraction's round.
    top = abs(exact)
    place = -24 if top < Fraction(2) ** -14 else math.floor(math.log2(top.numerator) - math.log2(top.denominator)) - 10
    candidates = {round(exact / Fraction(2) ** p) * Fraction(2) ** p for p in (place - 1, place, place + 1) if p >= -24}
    rounded = Fraction(float(got))
    if abs(exact) >= 65520:
        assert abs(rounded) == 65504
        assert status.value == Status.SATURATED
        return
    assert status.value == Status(0)
    assert rounded in candidates
    error = abs(rounded - exact)
    for step in (-1, 1):
        bits = int(np.array([got]).view(np.uint16)[0]) & 0x7FFF
        if 0 <= bits + step < 0x7C00:
            neighbour = Fraction(float(np.array([bits + step], np.uint16).view(np.float16)[0]))
            apart = abs(neighbour - abs(exact))
            assert apart >= error
            assert apart > error or bits & 1 == 0, "a tie goes to the even one"


def test_align_drops_less_than_a_unit(rng: np.random.Generator) -> None:
    x = (rng.standard_normal((64, 32)) * 10.0 ** rng.uniform(-6, 4, (64, 32))).astype(np.float16)
    for width in (14, 17, 26):
        a, top = half.align(x, width)
        unit = 2.0 ** (top - (width - 11))[:, None]
        assert (np.abs(a) < 1 << width).all()
        assert (np.abs(x.astype(np.float64) - a * unit) < unit).all()


def test_tables_stay_within_their_bounds() -> None:
    f = np.arange(1 << 14)
    relative = tables.exp2_fraction(f) / (2.0**15 * 2.0 ** (f / 2**14)) - 1
    assert relative.min() > -6.2e-5
    assert relative.max() < 2e-5
    assert (np.diff(tables.exp2_fraction(f)) >= 0).all()
    x = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    for sign in (1, -1):
        mantissa, exponent = half.split(np.float16(sign) * x)
        true = 65536 / (1 + np.exp(-sign * np.minimum(x.astype(np.float64), 600)))
        assert np.abs(tables.sigmoid(mantissa, exponent) - true).max() < 3.4


@given(st.floats(2.0**-90, 2.0**90))
def test_factor_is_near(value: float) -> None:
    factor = Factor.of(value)
    assert 1 << 16 <= factor.mantissa < 1 << 17
    assert abs(float(factor) / value - 1) <= 2.0**-17


def test_factor_refuses_what_it_cannot_hold() -> None:
    for value in (0.0, -1.0, math.nan, math.inf, 2.0**101):
        with pytest.raises(ValueError, match="needed a number"):
            Factor.of(value)
