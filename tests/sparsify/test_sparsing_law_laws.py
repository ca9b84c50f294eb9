# SPDX-License-Identifier: Apache-2.0
"""Laws of activation sparsity: recovery of known curves, inverses, derivatives, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from tilewright.sparsify.sparsing_law import (
    UnreachableError,
    compare_tokens,
    fit_activation_law,
    fit_scale,
    fit_width_depth,
    frequency_distribution,
)
from tilewright.sparsify.sparsing_law._claim_exact import RELU, SILU, published

CURVES = [("relu", name) for name in RELU] + [("silu", name) for name in SILU]


@pytest.mark.parametrize(("kind", "name"), CURVES)
def test_a_curve_without_noise_is_recovered(kind, name):
    law, tokens = published(kind, name)
    fit = fit_activation_law(tokens, law.predict(tokens), bootstrap=0)
    assert fit.kind == kind
    assert fit.limit == pytest.approx(law.limit, rel=1e-3)
    np.testing.assert_allclose(fit.predict(tokens), law.predict(tokens), rtol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [CURVES[2], CURVES[7]])
def test_noise_moves_the_limit_within_its_interval(kind, name):
    law, tokens = published(kind, name)
    noise = 1 + 3e-3 * np.random.default_rng(4).standard_normal(len(tokens))
    fit = fit_activation_law(tokens, law.predict(tokens) * noise, kind, bootstrap=60)
    low, high = fit.ci()
    assert low <= fit.limit <= high
    assert fit.limit == pytest.approx(law.limit, rel=0.03)
    # 60 points of 0.3 % noise; the interval is a few standard errors wide at most.
    assert high - low < 0.1 * law.limit
    again = fit_activation_law(tokens, law.predict(tokens) * noise, kind, bootstrap=60)
    assert again == fit
    assert len(fit.covariance) == len(fit.params)
    assert fit.residual == pytest.approx(3e-3, rel=0.4)


@pytest.mark.parametrize(("kind", "name"), CURVES)
def test_tokens_to_inverts_predict(kind, name):
    law, tokens = published(kind, name)
    for count in tokens[::7]:
        assert law.tokens_to(law.predict(count)) == pytest.approx(count, rel=1e-6)


@pytest.mark.parametrize(("kind", "name"), CURVES)
def test_derivative_is_the_slope(kind, name):
    law, tokens = published(kind, name)
    middle, step = tokens[20], 1e-4 * tokens[20]
    slope = (law.predict(middle + step) - law.predict(middle - step)) / (2 * step)
    assert law.derivative(middle) == pytest.approx(slope, rel=1e-5)
    assert np.all(law.derivative(tokens) < 0) if kind == "relu" else np.all(law.derivative(tokens) > 0)


def test_the_unit_does_not_change_the_curve():
    law, tokens = published("relu", "0.4B")
    ratio = law.predict(tokens)
    fit = fit_activation_law(tokens / 1e3, ratio, unit=1e6, bootstrap=0)
    assert fit.params == pytest.approx(fit_activation_law(tokens, ratio, bootstrap=0).params)
    assert fit.tokens_to(ratio[10]) == pytest.approx(tokens[10] / 1e3, rel=1e-3)


def test_extrapolation_needs_a_flag():
    law, tokens = published("silu", "0.4B")
    with pytest.raises(ValueError, match="more than 10 times"):
        law.predict(11 * tokens[-1])
    with pytest.raises(ValueError, match="extrapolate=True"):
        law.tokens_to(law.limit - 1e-6)
    far = law.predict([tokens[0], 11 * tokens[-1]], extrapolate=True)
    assert far[1] == pytest.approx(law.limit, abs=1e-3)
    assert law.derivative(11 * tokens[-1], extrapolate=True) > 0


@pytest.mark.parametrize(("kind", "step"), [("relu", -1e-3), ("silu", 1e-3)])
def test_a_ratio_beyond_the_limit_is_unreachable(kind, step):
    law, _ = published(kind, "0.4B")
    for beyond in (law.limit, law.limit + step):
        with pytest.raises(UnreachableError, match="unreachable"):
            law.tokens_to(beyond)
    if kind == "relu":
        with pytest.raises(UnreachableError, match="starts below"):
            law.tokens_to(0.9)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda d, a: (d[:7], a[:7]), "at least 8 checkpoints"),
        (lambda d, a: (d, a[:-1]), "two equal lists"),
        (lambda d, a: (d, 100 * a), "not percent"),
        (lambda d, a: (-d, a), "positive and finite"),
        (lambda d, a: (d, 0 * a), r"\(0, 1\]"),
    ],
)
def test_bad_points_are_named(change, part):
    law, tokens = published("relu", "0.4B")
    with pytest.raises(ValueError, match=part):
        fit_activation_law(*change(tokens, law.predict(tokens)))


def test_bad_options_are_named():
    law, tokens = published("relu", "0.4B")
    with pytest.raises(ValueError, match="kind='gelu'"):
        fit_activation_law(tokens, law.predict(tokens), "gelu")
    with pytest.raises(ValueError, match="bootstrap=0"):
        law.ci()
    with pytest.raises(ValueError, match="must be positive"):
        law.predict(0)


def test_a_law_is_json():
    law, tokens = published("silu", "0.4B")
    fit = fit_activation_law(tokens, law.predict(tokens), bootstrap=8)
    assert json.loads(json.dumps(fit.to_dict()))["limit"] == fit.limit


def test_width_depth_has_a_breakpoint():
    """The paper's: falling up to R = 114, a plateau of 8 % after it."""
    ratio = np.array([20, 35, 50, 74, 90, 114, 140, 180, 220, 282], dtype=float)
    limit = 0.08 + 0.0004 * np.maximum(114 - ratio, 0)
    found = fit_width_depth(ratio, limit)
    assert found.breakpoint == pytest.approx(114, abs=1)
    assert found.plateau == pytest.approx(0.08, abs=1e-3)
    assert found.slope == pytest.approx(-0.0004, rel=0.02)
    assert found.predict(200) == pytest.approx(0.08, abs=1e-3)
    np.testing.assert_allclose(found.predict(ratio), limit, atol=1e-3)
    with pytest.raises(ValueError, match="at least 4"):
        fit_width_depth([1, 2, 3], [1, 2, 3])


def test_scale_trend_of_the_published_limits():
    sizes = [0.1, 0.2, 0.4, 0.8, 1.2]
    relu = fit_scale(sizes, [RELU[f"{size}B"][3] for size in sizes])
    silu = fit_scale(sizes, [SILU[f"{size}B"][2] for size in sizes])
    # The paper quotes the end points, +1.7 and -2.7 points; a line through all five gives somewhat less.
    assert 0.012 < relu.change < 0.0175
    assert -0.027 < silu.change < -0.014
    assert relu.r > 0.9
    exact = fit_scale([1, 2, 4], [3, 5, 9])
    assert (exact.slope, exact.change, exact.r) == (pytest.approx(2), pytest.approx(6), pytest.approx(1))
    assert exact.stderr == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="at least 3"):
        fit_scale([1, 2], [1, 2])
    with pytest.raises(ValueError, match="two equal lists"):
        fit_scale([1, 2, 3], [1, 2])


def test_agreement_of_tokens():
    x = torch.linspace(0.1, 0.5, 9)
    same = compare_tokens(x, x)
    assert (same.r, same.distance, same.tokens) == (pytest.approx(1), 0.0, 9)
    assert compare_tokens(x, x.flip(0)).r == pytest.approx(-1)
    assert compare_tokens(x, x + 0.1).distance == pytest.approx(0.1, rel=1e-6)
    assert compare_tokens(x, torch.full((9,), 0.3)).r == 0.0
    with pytest.raises(ValueError, match="same text"):
        compare_tokens(x, x[:-1])


def test_distribution_of_frequencies():
    bins = frequency_distribution({"a": torch.tensor([0.0, 0.0, 1.0]), "b": torch.tensor([0.5])}, bins=2)
    assert bins.shares == [0.5, 0.5]
    assert (bins.never, bins.always) == (0.5, 0.25)
    assert bins.edges == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="at least one"):
        frequency_distribution({})
