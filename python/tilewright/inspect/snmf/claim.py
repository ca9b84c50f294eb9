# SPDX-License-Identifier: Apache-2.0
"""What SNMF promises, on planted features and on SmolLM2-135M-Instruct (docs/methods/snmf.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(experiment: Experiment) -> Iterator[Row]:
    """Monotony, planted features, the oracle, speed; detection, steering and the tree on the real model."""
    from tilewright.inspect.snmf import _claim_exact, _claim_model

    yield from _claim_exact.monotone_rows(experiment)
    yield from _claim_exact.planted_rows(experiment)
    yield from _claim_exact.oracle_rows(experiment)
    yield from _claim_exact.speed_rows(experiment)
    experiment.say("loading the model")
    study = _claim_model.Study(experiment.quick)
    yield from _claim_model.detection_rows(experiment, study)
    yield from _claim_model.weekday_rows(experiment, study)
    yield from _claim_model.steering_rows(experiment, study)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Left: planted features found again. Middle: detection by concept. Right: steering at equal KL."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.5, 1.2))
    cosines = values["planted"]["cosines"]
    for place, (name, text) in enumerate((("sparse", "5 % of\nneurons"), ("dense", "all\nneurons"))):
        points = [value for seed in cosines[name] for value in seed]
        spread = [place + 0.3 * ((7 * i) % 11 / 11 - 0.5) for i in range(len(points))]
        left.plot(spread, points, "o", markersize=4, alpha=0.6)
        left.text(place, 0.02, text, ha="center", fontsize=8)
    left.set(xticks=[], xlim=(-0.5, 1.5), ylim=(0, 1.03), ylabel="|cosine| with its planted feature")
    left.set_title("planted features", fontsize=10)

    found = values["detection"]
    names = found["concepts"]
    rows = range(len(names))
    for method, mark in (("DiffMean", "|"), ("neuron", "x"), ("SNMF", "o"), ("random", ".")):
        areas = found["auroc"][method]
        middle.plot([sum(a[i] for a in areas) / len(areas) for i in rows], rows, mark, label=method)
    middle.set_yticks(list(rows), names)
    middle.set_ylim(len(names) + 1.2, -0.7)
    middle.axvline(0.5, color="black", linewidth=0.6)
    middle.set_xlabel("AUROC, held-out sentences")
    middle.legend(fontsize=7, loc="lower center", ncols=2, columnspacing=0.8, handletextpad=0.1)
    middle.set_title("detection", fontsize=10)

    steering = values["steering"]
    for place, gains in enumerate(steering["gains"].values()):
        points = [max(concept) for layer in gains for concept in layer]
        spread = [place + 0.3 * ((7 * i) % 11 / 11 - 0.5) for i in range(len(points))]
        right.plot(spread, points, "o", markersize=4, alpha=0.6)
        right.hlines(sum(points) / len(points), place - 0.35, place + 0.35, color="black", linewidth=2)
    right.axhline(0, color="black", linewidth=0.6)
    right.set_xticks(range(len(steering["gains"])), list(steering["gains"]), fontsize=8)
    right.set_ylabel("gain of the concept's words, nat")
    right.set_xlabel(f"KL {' / '.join(map(str, steering['targets']))}; a point a concept,\nbars: means", fontsize=8)
    right.set_title("steering", fontsize=10)


CLAIM = Claim(
    "snmf",
    "MLP activations factorise into features of few neurons that can be read, detected and steered",
    "SNMF, arXiv 2506.10920",
    run,
    plot,
)
