# SPDX-License-Identifier: Apache-2.0
"""How sparse a metric may be: the level at which perplexity rises by p %, or at which a share of neurons is active."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tilewright.sparsify.sparsing_law.measurement import Measurement, Pass

TOLERANCE = 1e-3
# Rounds in which the dense model's ratio is corrected by the sparse model's.
_ROUNDS = 5


@dataclass(frozen=True)
class Found:
    """level: of the criterion, in [0, 1]. ratio: perplexity over the dense model's there. reached: whether some level
    above it exceeds the target. curve: (level, ratio) of every place tried, in order."""

    level: float
    ratio: float
    reached: bool
    curve: list[tuple[float, float]] = field(default_factory=list)


def match_perplexity(ratio_at: Callable[[float], float], p: float, tol: float = TOLERANCE) -> Found:
    """The largest level that bisection of [0, 1] finds with ratio < 1 + p/100, to within ``tol``.

    Where the ratio is not monotone (it may lie below 1 for small levels), that is one crossing of several.

    Raises:
        ValueError: p or tol is not positive.
    """
    if not p > 0:
        raise ValueError(f"p={p!r}: a rise of perplexity in percent, above 0, is needed")
    if not 0 < tol < 1:
        raise ValueError(f"tol={tol!r}: a width of the search over [0, 1], between 0 and 1, is needed")
    target, low, high, curve = 1 + p / 100, 0.0, 1.0, []
    best = None
    while high - low > tol:
        middle = (low + high) / 2
        ratio = ratio_at(middle)
        curve.append((middle, ratio))
        if ratio < target:
            low, best = middle, ratio
        else:
            high = middle
    if high == 1:
        everything = ratio_at(1.0)
        curve.append((1.0, everything))
        if everything < target:
            return Found(1.0, everything, False, curve)
    if best is None:
        best = ratio_at(low)
        curve.append((low, best))
    return Found(low, best, True, curve)


def perplexity_ratio(measured: Measurement, result: Pass) -> float:
    """exp of the mean difference of losses."""
    return math.exp(float((result.losses - measured.dense).mean()))


def ratio_at(measured: Sequence[Measurement], metric: str, scope: str = "token") -> Callable[[float], float]:
    """Perplexity ratio at a level, mean over models."""

    def ratio(level: float) -> float:
        ratios = []
        for one in measured:
            arg = one.criterion(metric, scope).level(level)
            ratios.append(perplexity_ratio(one, one.run(metric, arg, scope)))
        return sum(ratios) / len(ratios)

    return ratio


def match_ratio(measured: Measurement, metric: str, ratio: float, tol: float = 5e-3, scope: str = "token") -> float:
    """The argument at which the sparse model's activation ratio is ``ratio`` to within ``tol``.

    A level is found on the sampled activations of the dense model, and corrected by what a pass shows.

    Raises:
        ValueError: ratio or tol is out of range, or no argument comes so near.
    """
    if not 0 < ratio < 1 or not tol > 0:
        raise ValueError(
            f"ratio={ratio!r}, tol={tol!r}: an activation ratio between 0 and 1 and a tolerance are needed"
        )
    criterion, wanted, reached = measured.criterion(metric, scope), ratio, math.nan
    for _ in range(_ROUNDS):
        arg = criterion.level(_sampled_level(criterion.sampled_ratio, criterion.level, wanted, tol / 4))
        reached = measured.run(metric, arg, scope).ratio
        if abs(reached - ratio) <= tol:
            return arg
        wanted = min(max(wanted + ratio - reached, 0.0), 1.0)
    raise ValueError(f"metric {metric!r}: no argument gives the activation ratio {ratio}; the nearest is {reached:.4f}")


def _sampled_level(
    sampled: Callable[[float], float], to_arg: Callable[[float], float], wanted: float, tol: float
) -> float:
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        found = sampled(to_arg(middle))
        if abs(found - wanted) <= tol:
            return middle
        low, high = (middle, high) if found > wanted else (low, middle)
    return (low + high) / 2
