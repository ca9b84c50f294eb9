# SPDX-License-Identifier: Apache-2.0
"""The element-wise units against exact fractions and float64."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from edge_inputs import adversarial_rows, halves

from tilewright.edge import contract as c
from tilewright.edge.contract import rows

HALF_ULP = 2.0**-11


def near(got: np.ndarray, true: np.ndarray, relative: float) -> None:
    """|got - true| within ``relative`` and half a place of float16 (of a subnormal where it is one)."""
    bound = np.abs(true) * (relative + HALF_ULP) + 2.0**-25
    assert (np.abs(got.astype(np.float64) - true) <= bound).all()


def test_quantization_is_exact(rng: np.random.Generator) -> None:
    x = np.concatenate([adversarial_rows(40)[:7], halves(rng, 20, 40, spread=1.0), halves(rng, 20, 40)])
    q, scale = c.quantize(x, c.row_max(x))
    for row, codes, bits in zip(x, q, scale, strict=True):
        s = Fraction(float(np.array([bits], np.uint16).view(np.float16)[0]))
        assert s == max(Fraction(float(np.abs(row).max())), Fraction(168, 2**24))
        assert [int(v) for v in codes] == [round(127 * Fraction(float(v)) / s) for v in row]


def test_every_quotient_of_two_mantissas_is_exact() -> None:
    """All ties and near ties: every x up to s for a spread of maxima, subnormal ones too."""
    for bits in (168, 511, 1023, 1024, 0x3C00, 0x3FFF, 0x4155, 0x57F0):
        x = np.arange(0, bits + 1, dtype=np.uint16)[-6000:].view(np.float16)[None]
        q, _ = c.quantize(x, np.array([bits]))
        scaled = x[0].astype(np.float64) * 2.0**24
        m = [Fraction(127 * int(v), int(scaled[-1])) for v in scaled]
        assert q[0].tolist() == [round(v) for v in m]


def test_a_row_of_zeros_stays_zero() -> None:
    x = np.zeros((2, 8), np.float16)
    q, scale = c.quantize(x, c.row_max(x))
    assert not q.any()
    assert (scale == rows.MIN_SCALE_BITS).all()


def test_more_than_the_maximum_is_clamped_and_reported() -> None:
    status = c.StatusRegister()
    q, _ = c.quantize(np.array([[2.0, -2.0, 0.5]], np.float16), np.array([0x3C00]), status)
    assert q.tolist() == [[127, -127, 64]]
    assert status.value == c.Status.QUANT_CLAMP


@pytest.mark.parametrize("width", [1, 7, 96, 1536])
def test_rms_norm_against_float64(rng: np.random.Generator, width: int) -> None:
    x, weight = halves(rng, 12, width, spread=1.0), halves(rng, width, spread=0.5)
    y, largest = c.rms_max(x, weight, c.NormConstants.of(width, 1e-5))
    wide = x.astype(np.float64)
    true = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight.astype(np.float64)
    near(y, true, 2.0**-15 + 2.0**-12)
    assert np.array_equal(largest, c.row_max(y))


def test_rms_norm_at_the_extremes() -> None:
    x = adversarial_rows(64)[:7]
    y, _ = c.rms_max(x, np.ones(64, np.float16), c.NormConstants.of(64, 1e-6))
    wide = x.astype(np.float64)
    near(y, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6), 2.0**-15 + 2.0**-12)


@pytest.mark.parametrize("total", [1, 2, 3, 2**32 - 1, 2**32, 2**48, 2**49 - 1, 123456789012])
@pytest.mark.parametrize("width", [1, 3, 576, 2**14])
def test_inverse_root_is_the_floor(total: int, width: int) -> None:
    root, k = rows.inverse_root(total, width)
    assert k % 2 == 0
    assert 1 << 16 <= root < 1 << 17
    assert root**2 <= (width << k) / total < (root + 1) ** 2
    assert (width << (k - 2)) // total < 1 << 32


def test_dequantization_is_within_its_bound(rng: np.random.Generator) -> None:
    acc = rng.integers(-(2**20), 2**20, (10, 33)).astype(np.int32)
    scale = c.row_max(halves(rng, 10, 4, spread=1.0))
    factor = c.Factor.of(0.0123 / 127)
    y = c.dequantize(acc, scale, factor)
    s = scale.astype(np.uint16).view(np.float16).astype(np.float64)[:, None]
    near(y, acc * s * 0.0123 / 127, 2.0**-16 + 2.0**-30)


def test_dequantization_saturates() -> None:
    status = c.StatusRegister()
    y = c.dequantize(np.array([[2**30, -(2**30), 0]], np.int32), np.array([0x7BFF]), c.Factor.of(1.0), status)
    assert y.tolist() == [[65504, -65504, 0]]
    assert status.value == c.Status.SATURATED | c.Status.ACC_CLAMP


def test_residual_is_ieee_addition(rng: np.random.Generator) -> None:
    a, b = halves(rng, 40, 50), halves(rng, 40, 50)
    with np.errstate(over="ignore"):
        true = a + b
    got = c.residual_add(a, b)
    same = np.isfinite(true)
    assert np.array_equal(got[same], true[same])
    assert (np.abs(got[~same]) == 65504).all()


@pytest.mark.parametrize("kind", ["silu", "squared_relu"])
def test_gates_against_float64(rng: np.random.Generator, kind: str) -> None:
    gate, up = halves(rng, 20, 60, spread=1.0), halves(rng, 20, 60, spread=1.0)
    g, u = gate.astype(np.float64), up.astype(np.float64)
    if kind == "silu":
        got, true = c.silu_multiply(gate, up), g / (1 + np.exp(-g)) * u
        slack = np.abs(g * u) * 3.4 / 65536
    else:
        got, true, slack = c.squared_relu_multiply(gate, up), np.maximum(g, 0) ** 2 * u, 0.0
    fits = np.abs(true) < 65000
    bound = (np.abs(true) + slack) * HALF_ULP + slack + 2.0**-25
    assert (np.abs(got.astype(np.float64) - true) <= bound)[fits].all()


def test_rotation_against_float64(rng: np.random.Generator) -> None:
    x = halves(rng, 6, 3, 32, spread=1.0)
    angles = c.rope_table(6, 32)
    got = c.rope(x, angles).astype(np.float64)
    theta = np.arange(6)[:, None] * 10000.0 ** (-np.arange(0, 32, 2) / 32)
    pairs = x.astype(np.float64).reshape(6, 3, 16, 2)
    cosine, sine = np.cos(theta)[:, None], np.sin(theta)[:, None]
    true = np.stack([pairs[..., 0] * cosine - pairs[..., 1] * sine, pairs[..., 1] * cosine + pairs[..., 0] * sine], -1)
    size = np.abs(pairs).max(-1, keepdims=True)
    # The table's rounding, and half a place of the result.
    assert (np.abs(got.reshape(true.shape) - true) <= size * 2 * 2.0**-15 + np.abs(true) * HALF_ULP + 2.0**-24).all()
    assert np.array_equal(c.rope(x[:1], angles[:1]), np.where(x[:1] == 0, np.float16(0), x[:1]))


def test_rope_order_keeps_scores(rng: np.random.Generator) -> None:
    """Rotating neighbours of permuted rows is the half-split rotation of the original ones, up to the permutation."""
    order = c.rope_order(8)
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    x = halves(rng, 5, 1, 8, spread=0.5)
    got = c.rope(np.ascontiguousarray(x[..., order]), c.rope_table(5, 8))
    theta = np.arange(5)[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    first, second = x[:, 0, :4].astype(np.float64), x[:, 0, 4:].astype(np.float64)
    true = np.concatenate(
        [first * np.cos(theta) - second * np.sin(theta), second * np.cos(theta) + first * np.sin(theta)], -1
    )
    assert np.abs(got[:, 0].astype(np.float64) - true[:, order]).max() < 2.0**-9 * np.abs(true).max()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="needed float16"):
        c.quantize(np.zeros((1, 4), np.float32), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="width"):
        c.NormConstants.of(1 << 15, 1e-5)
    for eps in (-1e-5, math.nan, 1.0):
        with pytest.raises(ValueError, match="eps"):
            c.NormConstants.of(64, eps)
    with pytest.raises(ValueError, match="mode"):
        c.dequant_fuse(np.zeros((1, 2), np.int32), np.array([0x3C00]), c.Factor.of(1.0), "residual")
