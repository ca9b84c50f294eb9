# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was measured, from the JSON documents of ``tw sparsity``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "cett": "CETT",
    "cats": "|s| < layer quantile (CATS)",
    "fat": "|s| < one threshold (FAT)",
    "topk": "top-k of |s| a token",
}


def draw(document: Mapping[str, Any], figure: Figure) -> None:
    """The picture of a document of ``tw sparsity measure``, ``pareto`` or ``fit``.

    Raises:
        ValueError: the document is of another kind.
    """
    kind = document.get("verb")
    if kind == "measure":
        left, right = figure.subplots(1, 2)
        layers(left, document["report"]["per_layer"])
        frequencies(right, document["frequency"])
    elif kind == "pareto":
        curves(figure.subplots(), document["curves"])
    elif kind == "fit":
        law(figure.subplots(), document["points"], document["law"])
    else:
        raise ValueError(f"a document of verb {kind!r}; one of measure, pareto or fit is needed")


def layers(axes: Axes, per_layer: Mapping[str, float]) -> None:
    """Activation ratio by layer."""
    values = [100 * value for value in per_layer.values()]
    axes.bar(range(len(values)), values, color="C0")
    mean = sum(values) / len(values)
    axes.axhline(mean, color="black", linewidth=0.8, label=f"mean {mean:.1f} %")
    axes.set_xlabel("layer")
    axes.set_ylabel("active neurons, % of a token's")
    axes.legend()


def frequencies(axes: Axes, bins: Mapping[str, Any]) -> None:
    """Distribution of activation frequencies."""
    edges = 100 * np.asarray(bins["edges"])
    axes.bar(edges[:-1], 100 * np.asarray(bins["shares"]), np.diff(edges), align="edge", color="C1")
    axes.set_xlabel("tokens for which a neuron is active, %")
    axes.set_ylabel("neurons, %")


def curves(axes: Axes, by_metric: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Rise of perplexity against activation ratio."""
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullLocator

    for metric, reports in by_metric.items():
        points = sorted((100 * one["activation_ratio"], one["ppl_ratio"]) for one in reports)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", label=LABELS.get(metric, metric), linewidth=1, markersize=4)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%.2f"))
    axes.axhline(1, color="black", linewidth=0.7)
    axes.set_xlabel("active neurons, %")
    axes.set_ylabel("perplexity over dense")
    axes.legend(fontsize=8)


def law(axes: Axes, points: Sequence[Sequence[float]], fitted: Mapping[str, Any]) -> None:
    """Measured ratios along training, the fitted curve to ten times the tokens, and its limit."""
    from tilewright.sparsify.sparsing_law.laws import REACH, Law

    tokens, ratio = np.asarray(points, np.float64).T
    fields = {name: value for name, value in fitted.items() if name != "limit"}
    found = Law(**{**fields, "range": tuple(fields["range"])})
    axes.plot(tokens, 100 * ratio, "o", markersize=3, color="C0", label="measured")
    reach = np.geomspace(tokens.min(), REACH * tokens.max(), 200)
    axes.plot(reach, 100 * found.predict(reach, extrapolate=True), color="C1", label=f"law ({found.kind})")
    label = f"limit {100 * found.limit:.2f} %"
    axes.axhline(100 * found.limit, color="black", linewidth=0.7, linestyle="--", label=label)
    if found.interval is not None:
        axes.axhspan(*(100 * bound for bound in found.interval), color="black", alpha=0.1)
    axes.set_xscale("log")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("active neurons, %")
    axes.legend(fontsize=8)


def tokens(axes: Axes, first: Sequence[float], second: Sequence[float], names: tuple[str, str]) -> None:
    """Token-wise activation ratios of two models on one text, with y = x."""
    x, y = 100 * np.asarray(first), 100 * np.asarray(second)
    axes.plot(x, y, ".", markersize=2, alpha=0.5)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color="black", linewidth=0.7)
    axes.set_xlabel(f"{names[0]}: active neurons of a token, %")
    axes.set_ylabel(f"{names[1]}: the same token")
