# SPDX-License-Identifier: Apache-2.0
"""Activation sparsity of a model by any metric, at a given argument, perplexity or activation ratio."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tilewright._methods import choose
from tilewright.capture import Batch
from tilewright.sparsify.sparsing_law.criteria import Cett, Rule, below, gate_rule
from tilewright.sparsify.sparsing_law.measurement import KINDS, Measurement, dropped
from tilewright.sparsify.sparsing_law.neurons import (
    FeedForward,
    column_norms,
    feed_forwards,
    neuron_thresholds,
    output_weight,
)
from tilewright.sparsify.sparsing_law.report import SparsityReport, report_of
from tilewright.sparsify.sparsing_law.search import TOLERANCE, Found, match_perplexity, match_ratio, ratio_at
from tilewright.sparsify.thresholds import Thresholds

Layers = Iterable[str | FeedForward] | None


def cett_thresholds(
    model: nn.Module, data: Iterable[Batch], cett: float, layers: Layers = None, **options: Any
) -> dict[str, float]:
    """eps by block: the largest bound on ||n_i|| that keeps every block's tail error at ``cett``.

    data: token batches, as for :class:`Measurement`, whose ``options`` (sample_rows, seed, progress) may be given.

    Raises:
        ValueError: cett is not in [0, 1], or as :class:`Measurement`.
    """
    criterion = Measurement(model, data, layers=layers, **options).criterion("cett")
    assert isinstance(criterion, Cett)
    return criterion.eps(criterion.check(cett))


@contextlib.contextmanager
def apply_thresholds(
    model: nn.Module, eps: Mapping[str, float] | Thresholds, layers: Layers = None
) -> Iterator[nn.Module]:
    """While the context lives, the model computes with weak neurons set to zero.

    eps: bounds on ||n_i|| = |h_i| ||Wo[:, i]|| by block (:func:`cett_thresholds`), or stored thresholds. Blocks that it
        does not name stay dense. The comparison is made in float32, on the activation as the model has it.

    Raises:
        ValueError: it names a block that the model does not have, or a bound does not fit the block's neurons.
    """
    blocks = {block.name: block for block in feed_forwards(model, layers)}
    if unknown := sorted(set(eps) - set(blocks)):
        raise ValueError(f"thresholds for {unknown[0]}, which is no block of the model; it has {', '.join(blocks)}")
    with dropped(model, {name: _rule(model, blocks[name], eps, name) for name in eps}):
        yield model


def _rule(model: nn.Module, block: FeedForward, eps: Mapping[str, float] | Thresholds, name: str) -> Rule:
    weight = output_weight(model, block)
    if not isinstance(eps, Thresholds):
        if not eps[name] >= 0:
            raise ValueError(f"threshold of {name} is {eps[name]!r}; 0 or more is needed")
        return Rule(f"{block.down}@input", below(neuron_thresholds(eps[name], column_norms(weight))))
    bound: Tensor = eps[name]
    if bound.dim() and len(bound) != weight.shape[1]:
        raise ValueError(f"{len(bound)} thresholds for {name}, which has {weight.shape[1]} neurons")
    return Rule(f"{block.down}@input", below(bound)) if eps.score == "hidden" else gate_rule(block, below(bound))


def sparsity(
    model: nn.Module | Measurement,
    data: Iterable[Batch] | None = None,
    metric: str = "zero",
    arg: float | None = None,
    *,
    p: float | None = None,
    ratio: float | None = None,
    tol: float | None = None,
    scope: str = "token",
    **options: Any,
) -> SparsityReport:
    """Activation sparsity of a model on a text by a metric, and what dropping the inactive neurons costs.

    model, data: as for :class:`Measurement`, or a Measurement alone; ``options`` are its other arguments.
    metric: "zero" (s_i = 0), "fat" (|s_i| < arg in all layers), "topk" (all but the largest |s_i| of each token; arg is
        the share dropped), "cats" (|s_i| below the layer's arg-quantile), "cett" (tail error arg in all layers), or
        "cett_ppl" (CETT with p = arg, 1 when None).
    arg, p, ratio: give one. p searches for the argument at which perplexity rises by p percent, ratio for the one at
        which that share of neurons is active.
    tol: width at which a search ends: of the level (1e-3) for p, of the activation ratio (5e-3) for ratio.
    scope: of topk, "token" or "global" (the k largest of a whole batch).

    Raises:
        ValueError: the metric is unknown, not exactly one of arg, p and ratio is given, or one is out of range.
    """
    if metric == "cett_ppl":
        if ratio is not None or (arg is not None and p is not None):
            raise ValueError("metric 'cett_ppl' takes p (or arg, the same) alone; use 'cett' for a ratio")
        metric, p, arg = "cett", 1.0 if p is None and arg is None else (p if arg is None else arg), None
    choose(KINDS, metric, "metric")
    given = [name for name, value in (("arg", arg), ("p", p), ("ratio", ratio)) if value is not None]
    if len(given) != (0 if metric == "zero" else 1):
        raise ValueError(
            f"metric {metric!r} with {', '.join(given) or 'neither arg, p nor ratio'}: "
            + ("it takes none of arg, p and ratio" if metric == "zero" else "one of arg, p and ratio is needed")
        )
    measured = _measured(model, data, options)
    criterion = measured.criterion(metric, scope)
    if p is not None:
        found = match_perplexity(ratio_at([measured], metric, scope), p, TOLERANCE if tol is None else tol)
        return report_of(measured, metric, criterion.level(found.level), scope, found, p)
    if ratio is not None:
        arg = match_ratio(measured, metric, ratio, 5e-3 if tol is None else tol, scope)
    return report_of(measured, metric, criterion.check(arg), scope)


def _measured(model: nn.Module | Measurement, data: Iterable[Batch] | None, options: dict[str, Any]) -> Measurement:
    if isinstance(model, Measurement):
        if data is not None or options:
            raise ValueError("a Measurement has its data and options already; give them to it")
        return model
    if data is None:
        raise ValueError("data=None: token batches are needed")
    return Measurement(model, data, **options)


def cett_ppl(
    model: nn.Module | Measurement,
    data: Iterable[Batch] | None = None,
    p: float = 1.0,
    tol: float = TOLERANCE,
    **options: Any,
) -> SparsityReport:
    """CETT-PPL-p%: the sparsity that a model can have while perplexity rises by at most p percent (arXiv 2411.02335).

    Bisection over the tail error c in [0, 1] that all layers share; thresholds come from the dense model's activations,
    and are applied in all layers at once. Arguments as for :func:`sparsity`.
    """
    return sparsity(model, data, "cett", p=p, tol=tol, **options)


def pareto(
    model: nn.Module | Measurement,
    data: Iterable[Batch] | None = None,
    metric: str = "cett",
    grid: Sequence[float] = (),
    *,
    by: str = "arg",
    scope: str = "token",
    **options: Any,
) -> list[SparsityReport]:
    """Perplexity against activation ratio: a report for each value of the grid.

    by: what the grid holds, "arg" (the metric's), "ratio" (activation ratios) or "p" (rises of perplexity in percent).

    Raises:
        ValueError: the grid is empty, or as :func:`sparsity`.
    """
    if by not in ("arg", "ratio", "p"):
        raise ValueError(f"by={by!r}: 'arg', 'ratio' or 'p' is needed")
    if not len(grid):
        raise ValueError("grid is empty; give at least one value")
    measured = _measured(model, data, options)
    found = []
    for value in grid:
        asked: dict[str, Any] = {by: value}
        found.append(sparsity(measured, metric=metric, scope=scope, **asked))
    return found


@dataclass(frozen=True)
class JointCett:
    """One tail error for several checkpoints: cett, the mean perplexity ratio there, and each checkpoint's report."""

    cett: float
    ratio: float
    reports: list[SparsityReport]
    found: Found


def joint_cett_ppl(
    models: Sequence[nn.Module | Measurement],
    data: Iterable[Batch] | None = None,
    p: float = 1.0,
    tol: float = TOLERANCE,
    **options: Any,
) -> JointCett:
    """The one tail error at which the perplexity ratio, averaged over checkpoints, rises by p percent.

    The paper takes the last five checkpoints of a run (after its warm-up) and then measures all of them with that c,
    ``sparsity(model, data, "cett", c)``, which makes the curve over training smooth.

    Raises:
        ValueError: there is no model, or as :func:`cett_ppl`.
    """
    if not models:
        raise ValueError("models is empty; at least one checkpoint is needed")
    batches = None if data is None else list(data)
    measured = [_measured(model, batches, options) for model in models]
    found = match_perplexity(ratio_at(measured, "cett"), p, tol)
    return JointCett(found.level, found.ratio, [report_of(one, "cett", found.level) for one in measured], found)
