# SPDX-License-Identifier: Apache-2.0
"""The scaling law is recovered from noisy points; token-by-token predictability is that of a regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tilewright.inspect.sae_dark_matter import per_token_predictability, scaling_law

WIDTHS = [2.0**p for p in range(14, 21)]
C, A, M = 0.12, 67.6, -0.6


def points(noise=0.0, seed=0):
    factor = 1 + noise * np.random.default_rng(seed).standard_normal(len(WIDTHS))
    return [(C + A * w**M) * f for w, f in zip(WIDTHS, factor, strict=True)]


def test_exact_points_give_back_the_law():
    law = scaling_law(WIDTHS, points())
    assert (law.c, law.a, law.m) == pytest.approx((C, A, M), rel=1e-4)
    assert law(2**17) == pytest.approx(C + A * 2 ** (17 * M), rel=1e-6)


def test_noisy_points_give_c_within_a_tenth():
    """2 % noise, 7 widths. The law falls from 2.7 c to 1.1 c there, so c is known to about 4 %."""
    found = np.array([scaling_law(WIDTHS, points(0.02, seed)).c for seed in range(20)])
    assert abs(float(np.median(found)) / C - 1) < 0.05
    assert np.mean(np.abs(found / C - 1) < 0.1) >= 0.85


def test_standard_errors_cover_the_truth():
    laws = [scaling_law(WIDTHS, points(0.02, seed)) for seed in range(20)]
    covered = [abs(law.c - C) <= 3 * law.stderr[0] for law in laws]
    assert np.mean(covered) >= 0.85
    assert all(law.stderr[0] == float("inf") for law in [scaling_law(WIDTHS[:3], points()[:3])])


def test_total_is_taken_apart():
    law = scaling_law(WIDTHS, points(), nonlinear=[0.08, 0.1] * 3 + [0.09])
    parts = law.decompose(2**16)
    assert sum(parts.values()) == pytest.approx(law(2**16))
    assert parts["nonlinear error"] == pytest.approx(0.09)
    assert parts["linear error"] == pytest.approx(C - 0.09, rel=1e-3)
    with pytest.raises(ValueError, match="nonlinear="):
        scaling_law(WIDTHS, points()).decompose(2**16)


def test_a_pure_power_law_has_no_floor():
    assert scaling_law(WIDTHS, [A * w**M for w in WIDTHS]).c < 1e-4 * A * WIDTHS[0] ** M


@pytest.mark.parametrize(
    ("widths", "fvu", "message"),
    [
        ([1, 2], [0.5, 0.4], "three widths"),
        ([1, 2, 2], [0.5, 0.4, 0.4], "three widths"),
        ([1, 2, 3], [0.5, 0.4], "one FVU each"),
        ([1, 2, 3], [0.5, 0.4, -0.1], "positive"),
        ([1, 2, 3], [0.5, 0.4, float("nan")], "positive"),
    ],
)
def test_impossible_points_are_named(widths, fvu, message):
    with pytest.raises(ValueError, match=message):
        scaling_law(widths, fvu)


def test_predictability_is_a_squared_correlation():
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(500, generator=generator)
    hard = torch.rand(500, generator=generator)
    large = 0.6 * small + 0.3 * hard + 2
    found = per_token_predictability([small, large], [hard, hard])
    r = np.corrcoef(small.double(), large.double())[0, 1] ** 2
    assert found.r2[0, 1] == pytest.approx(r, rel=1e-6)
    assert found.gain[0, 1] == pytest.approx(1.0, abs=1e-6)
    assert set(per_token_predictability([small, large, hard]).r2) == {(0, 1), (0, 2), (1, 2)}
    assert per_token_predictability([small, large]).gain == {}


def test_predictability_needs_the_same_tokens():
    with pytest.raises(ValueError, match="same tokens"):
        per_token_predictability([torch.rand(5), torch.rand(6)])
    with pytest.raises(ValueError, match="at least two"):
        per_token_predictability([torch.rand(5)])
    with pytest.raises(ValueError, match="one each"):
        per_token_predictability([torch.rand(5), torch.rand(5)], [torch.rand(5)])
