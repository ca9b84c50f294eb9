# SPDX-License-Identifier: Apache-2.0
"""How the limit depends on a model's shape and size, and which tokens and neurons make two models alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class WidthDepth:
    """A0(R) = a + k R up to R*, constant above: R is hidden size over layers.

    breakpoint: R*. intercept, slope: a and k. plateau: a + k R*. residual: root mean square.
    """

    breakpoint: float
    intercept: float
    slope: float
    plateau: float
    residual: float

    def predict(self, ratio_wd: float | Sequence[float]) -> Any:
        """The limit at width-depth ratios."""
        values = self.intercept + self.slope * np.minimum(np.asarray(ratio_wd, np.float64), self.breakpoint)
        return float(values) if values.ndim == 0 else values


def fit_width_depth(ratio_wd: Sequence[float], limit: Sequence[float], *, grid: int = 400) -> WidthDepth:
    """Fit the piecewise line by scanning R* between the second and the last ratio, least squares at each.

    Raises:
        ValueError: lengths differ, or fewer than four different ratios are given.
    """
    r, y = _two_lists("ratio_wd", ratio_wd, "limit", limit)
    places = np.unique(r)
    if len(places) < 4:
        raise ValueError(f"{len(places)} different width-depth ratios; at least 4 are needed for a breakpoint")
    best: tuple[float, float, Any] | None = None
    for breakpoint in np.union1d(np.linspace(places[1], places[-1], grid), places[1:]):
        design = np.stack([np.ones_like(r), np.minimum(r, breakpoint)], 1)
        line = np.linalg.lstsq(design, y, rcond=None)[0]
        error = float(np.sum((design @ line - y) ** 2))
        if best is None or error < best[0]:
            best = (error, float(breakpoint), line)
    assert best is not None
    error, breakpoint, (a, k) = best
    return WidthDepth(breakpoint, float(a), float(k), float(a + k * breakpoint), float(np.sqrt(error / len(r))))


@dataclass(frozen=True)
class ScaleTrend:
    """A line of the limit over parameters: slope a unit of parameters with its standard error, Pearson's r, and the
    change that the line makes over the range given."""

    slope: float
    stderr: float
    r: float
    change: float


def fit_scale(parameters: Sequence[float], limit: Sequence[float]) -> ScaleTrend:
    """Ordinary least squares of limits over parameter counts (in any unit).

    Raises:
        ValueError: lengths differ, or fewer than three points are given.
    """
    x, y = _two_lists("parameters", parameters, "limit", limit)
    if len(x) < 3 or np.ptp(x) == 0:
        raise ValueError(f"{len(x)} points; at least 3 of different size are needed")
    centered = x - x.mean()
    slope = float(centered @ y / (centered @ centered))
    left = y - y.mean() - slope * centered
    stderr = float(np.sqrt(left @ left / (len(x) - 2) / (centered @ centered)))
    r = float(np.corrcoef(x, y)[0, 1]) if np.ptp(y) > 0 else 0.0
    return ScaleTrend(slope, stderr, r, slope * float(np.ptp(x)))


@dataclass(frozen=True)
class TokenAgreement:
    """Token-wise activation ratios of two models on one text: Pearson's r, and how far they lie from y = x (root mean
    square of the difference)."""

    r: float
    distance: float
    tokens: int


def compare_tokens(first: Tensor, second: Tensor) -> TokenAgreement:
    """Agreement of two reports' ``token_ratio`` on the same text.

    Raises:
        ValueError: they have different lengths, or fewer than two tokens.
    """
    x, y = first.double().numpy(), second.double().numpy()
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(
            f"token ratios of shapes {list(x.shape)} and {list(y.shape)}; two of the same text, of at least two "
            "tokens, are needed"
        )
    r = float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0
    return TokenAgreement(r, float(np.sqrt(np.mean((x - y) ** 2))), len(x))


@dataclass(frozen=True)
class FrequencyBins:
    """How often neurons are active: shares of all neurons by activation frequency.

    edges: [bins + 1]; shares: [bins], summing to 1. never, always: neurons active for no token, and for every one.
    """

    edges: list[float]
    shares: list[float]
    never: float
    always: float


def frequency_distribution(frequency: dict[str, Tensor], bins: int = 50) -> FrequencyBins:
    """Distribution of a report's ``frequency`` over the neurons of all layers.

    Raises:
        ValueError: there is no neuron, or bins is not positive.
    """
    if not frequency or bins < 1:
        raise ValueError(f"{len(frequency)} layers, bins={bins}: at least one of each is needed")
    values = np.concatenate([one.double().numpy() for one in frequency.values()])
    counts, edges = np.histogram(values, bins, (0.0, 1.0))
    shares = (counts / len(values)).tolist()
    return FrequencyBins(edges.tolist(), shares, float(np.mean(values == 0)), float(np.mean(values == 1)))


def _two_lists(first: str, x: Sequence[float], second: str, y: Sequence[float]) -> tuple[Any, Any]:
    one, two = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if one.ndim != 1 or one.shape != two.shape:
        raise ValueError(f"{first} has shape {list(one.shape)}, {second} {list(two.shape)}; two equal lists are needed")
    if not (np.all(np.isfinite(one)) and np.all(np.isfinite(two))):
        raise ValueError(f"{first} and {second} must be finite")
    return one, two
