# SPDX-License-Identifier: Apache-2.0
"""What Sparsing Law promises: the metric, its trade-off on SmolLM2, trends of training, and the fits
(docs/methods/sparsing-law.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(experiment: Experiment) -> Iterator[Row]:
    """Definition, fits of published laws, trends of training, SmolLM2: metric, trade-off, deployment."""
    from tilewright.sparsify.sparsing_law import _claim_exact, _claim_model, _claim_training

    yield from _claim_exact.definition_rows(experiment)
    yield from _claim_exact.fit_rows(experiment)
    yield from _claim_training.trend_rows(experiment)
    yield from _claim_model.model_rows(experiment)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Left: perplexity against active neurons by criterion. Right: active neurons along training, ReLU and SiLU."""
    from tilewright.sparsify.sparsing_law.plots import curves

    left, right = figure.subplots(1, 2)
    curves(left, values["pareto"])
    left.set_title("SmolLM2-135M: which neurons to drop")
    for activation, color in (("silu", "C1"), ("relu", "C0")):
        for seed, points in enumerate(values["training"][activation]):
            x = [point["tokens"] / 1e6 for point in points]
            y = [100 * point["activation_ratio"] for point in points]
            right.plot(x, y, "o-", color=color, markersize=3, linewidth=1, label=_name(activation, seed))
    for seed, points in enumerate(values["training"]["relu"]):
        x = [point["tokens"] / 1e6 for point in points]
        y = [100 * point["nonzero"] for point in points]
        right.plot(x, y, ":", color="C0", linewidth=1, label="ReLU, not zero" if seed == 0 else None)
    right.set_xlabel("bytes trained on, millions")
    right.set_ylabel("active neurons at +1 % perplexity, %")
    right.set_title("small models in training")
    right.legend(fontsize=8)


def _name(activation: str, seed: int) -> str | None:
    return {"relu": "ReLU", "silu": "SiLU"}[activation] if seed == 0 else None


CLAIM = Claim(
    "sparsing-law",
    "Dropping neurons by their contribution's length costs least; ReLU grows sparser in training, SiLU does not",
    "Sparsing Law, arXiv 2411.02335",
    run,
    plot,
)
