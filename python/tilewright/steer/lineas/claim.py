# SPDX-License-Identifier: Apache-2.0
"""What LinEAS promises, on SmolLM2-135M-Instruct and benign pairs of texts (docs/methods/lineas.md)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row, at_least, at_most, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tilewright.steer.evaluation import Evaluation
    from tilewright.steer.lineas._claim_model import Bench
    from tilewright.steer.steering import Steering

GAMMAS = (0.2, 0.4)
METHODS = {
    "LinEAS": ("lineas", {}),
    "Lin-AcT, sequential": ("lin_act", {"sequential": True}),
    "Lin-AcT, at once": ("lin_act", {"sequential": False}),
    "DiffMean": ("diffmean", {}),
}


def run(experiment: Experiment) -> Iterator[Row]:
    """Exact parts, then the model: held-out loss, strength, utility, sparsity, folding and engine, speed."""
    from tilewright.steer.lineas import _claim_exact
    from tilewright.steer.lineas._claim_model import Bench

    yield from _claim_exact.distance_rows()
    yield _claim_exact.one_layer_row(experiment)
    yield from _claim_exact.prox_rows()
    experiment.say("loading the model")
    bench = Bench(experiment.quick)
    yield from speed_rows(experiment, bench)
    experiment.say("all methods on all pairs and seeds")
    runs = spread(
        one_run, list(itertools.product(bench.size.pairs, bench.size.seeds)), partial(Bench, experiment.quick)
    )
    experiment.values["strengths"] = bench.size.strengths
    experiment.values["runs"] = [{key: run[key] for key in ("pair", "seed", "curves")} for run in runs]
    yield from loss_rows(experiment, runs)
    yield from exactness_rows(experiment, bench, runs[0]["fitted"]["LinEAS"])
    yield from utility_rows(experiment, bench, runs)
    yield from sparsity_rows(experiment, bench, runs[0])


def curve(evaluation: Evaluation, steering: Steering, strengths: Sequence[float]) -> dict[str, list[float]]:
    """Held-out loss and probe score by strength."""
    points = [evaluation.steered(steering, s) for s in strengths]
    return {"loss": [loss for loss, _ in points], "score": [score for _, score in points]}


def one_run(which: tuple[str, int], bench: Bench) -> dict[str, Any]:
    """All methods on one pair of texts; which: its name and a seed."""
    name, seed = which
    fitted = {label: bench.fit(method, name, seed, **options) for label, (method, options) in METHODS.items()}
    evaluation = bench.evaluation(fitted["LinEAS"], name, seed)
    curves = {label: curve(evaluation, one, bench.size.strengths) for label, one in fitted.items()}
    return {"pair": name, "seed": seed, "fitted": fitted, "curves": curves}


def loss_ratios(curves: dict[str, dict[str, list[float]]], label: str) -> tuple[float, float]:
    """Held-out loss of LinEAS over a method's: at strength 1, and each at the strength that is best for it."""
    own, other = curves["LinEAS"]["loss"], curves[label]["loss"]
    return own[-1] / other[-1], min(own) / min(other)


def loss_rows(experiment: Experiment, runs: list[dict[str, Any]]) -> Iterator[Row]:
    """Item 4: the central claim, all maps active; the same with each method at its best strength; the probe's score."""
    many = f"mean of {len(runs)} runs"
    paper = "LinEAS mitigates more than Lin-AcT"
    at_full: dict[str, Sequence[float]] = {}
    at_best: dict[str, Sequence[float]] = {}
    for label in METHODS:
        if label != "LinEAS":
            at_full[label], at_best[label] = zip(*(loss_ratios(run["curves"], label) for run in runs), strict=True)
    at_full["unsteered"] = [run["curves"]["LinEAS"]["loss"][-1] / run["curves"]["LinEAS"]["loss"][0] for run in runs]
    experiment.values |= {"ratios": at_full, "ratios at the best strengths": at_best}
    for label, ratios in at_full.items():
        row = at_most(f"held-out loss, LinEAS over {label}, {many}", sum(ratios) / len(runs), 0.9, paper=paper)
        judged = label.startswith("Lin-AcT")
        yield experiment.in_full(row) if judged else replace(row, paper="", must="reported", holds=True)
    for label, ratios in at_best.items():
        mean = sum(ratios) / len(runs)
        yield Row(f"the same over {label}, each at its best strength of those tried", "", mean, "reported", True)
    strengths = experiment.values["strengths"]
    scores = [sum(run["curves"]["LinEAS"]["score"][i] for run in runs) / len(runs) for i in range(len(strengths))]
    experiment.values["scores"] = scores
    name = f"probe's score of the target by strength {', '.join(f'{s:g}' for s in strengths)}, {many}"
    shown = " < ".join(f"{s:.3f}" for s in scores)
    rises = all(a < b for a, b in itertools.pairwise(scores))
    yield experiment.in_full(Row(name, "rises with strength", shown, "strictly rising", rises))


def exactness_rows(experiment: Experiment, bench: Bench, steering: Steering) -> Iterator[Row]:
    """Item 7, and the decode engine."""
    experiment.say("folding, decode engine")
    error, untouched = bench.folding_errors(steering)
    yield at_most("folded over hooked model, largest difference of a logit over the largest logit", error, 1e-5)
    yield Row("strength 0", "the model itself", "same bits" if untouched else "other bits", "same bits", untouched)
    different, common = bench.engine_agrees(steering)
    yield at_most("decode engine and hooked low-bit model, logits with other bits", float(different), 0.0)
    yield at_least("decode engine and hooked low-bit model, equal tokens of 24", float(common), 24.0)


def matched_strength(strengths: Sequence[float], scores: Sequence[float], wanted: float) -> float:
    """The strength at which the score is first reached, on straight lines between the measured ones."""
    for i in range(1, len(scores)):
        if scores[i] >= wanted:
            share = (wanted - scores[i - 1]) / (scores[i] - scores[i - 1])
            return strengths[i - 1] + max(share, 0.0) * (strengths[i] - strengths[i - 1])
    return strengths[-1]


def utility_rows(experiment: Experiment, bench: Bench, runs: list[dict[str, Any]]) -> Iterator[Row]:
    """Item 5: perplexity of neutral text where the probe's score is that of the weakest method at full strength."""
    experiment.say("perplexity of neutral text")
    labels = ("LinEAS", "Lin-AcT, sequential", "DiffMean")
    plain = bench.perplexity()
    found: dict[str, list[dict[str, float]]] = {label: [] for label in labels}
    for run in runs[:: len(bench.size.seeds)]:
        wanted = min(max(run["curves"][label]["score"]) for label in labels)
        for label in labels:
            strength = matched_strength(bench.size.strengths, run["curves"][label]["score"], wanted)
            perplexity = bench.perplexity(run["fitted"][label], strength)
            found[label].append({"strength": strength, "score": wanted, "perplexity": perplexity})
    experiment.values["utility"] = {"unsteered": plain} | found
    mean = {label: sum(one["perplexity"] for one in rows) / len(rows) for label, rows in found.items()}
    yield Row("perplexity of neutral text, unsteered", "", plain, "reported", True)
    yield Row("the same under LinEAS, probe score matched", "", mean["LinEAS"], "reported", True)
    for label in labels[1:]:
        ratio = mean["LinEAS"] / mean[label]
        yield experiment.in_full(at_most(f"perplexity at matched probe score, LinEAS over {label}", ratio, 1.0))


def one_gamma(which: tuple[str, int, float], bench: Bench) -> tuple[float, float]:
    """Support and held-out loss on a pair of texts; which: its name, a seed and gamma.

    Without the group term, which removes whole places and so spends the reduction on what is asked of coordinates.
    """
    name, seed, gamma = which
    one = bench.fit("lineas", name, seed, gamma=gamma, lambda_g=0.0)
    return one.support(), bench.evaluation(one, name, seed).steered(one, 1.0)[0]


def sparsity_rows(experiment: Experiment, bench: Bench, run: dict[str, Any]) -> Iterator[Row]:
    """Item 6: some gamma with few coordinates and most of the reduction."""
    start, dense = run["curves"]["LinEAS"]["loss"][0], run["curves"]["LinEAS"]["loss"][-1]
    gammas = GAMMAS[:1] if experiment.quick else GAMMAS
    experiment.say(f"gamma {', '.join(map(str, gammas))}")
    cases = [(run["pair"], run["seed"], gamma) for gamma in gammas]
    found = spread(one_gamma, cases, partial(type(bench), experiment.quick), own=bench)
    points = [
        {"gamma": gamma, "support": support, "kept": (start - loss) / (start - dense)}
        for gamma, (support, loss) in zip(gammas, found, strict=True)
    ]
    experiment.values["sparsity"] = points
    few = [one["kept"] for one in points if one["support"] <= 0.05]
    name = "share of the held-out reduction kept with at most 5 % of the coordinates"
    paper = "about 1 % of the coordinates keeps the mitigation"
    yield experiment.in_full(at_least(name, max(few, default=float("nan")), 0.8, paper=paper))


def speed_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 8: an optimiser step over the model's own forward and backward pass, and the loss's part of it."""
    experiment.say("speed")
    times = bench.step_times(1 if experiment.quick else 7)
    experiment.values["times"] = times
    ratio = times["step"] / times["bare"]
    yield experiment.in_full(at_most("step over the model's forward and backward pass, time", ratio, 1.3))
    yield experiment.in_full(
        at_most("distances and their gradient, share of a step", times["loss"] / times["step"], 0.1)
    )
    ratio = times["loss"] / times["loss by torch.sort"]
    yield experiment.in_full(at_most("distances and their gradient over the same by torch.sort, time", ratio, 0.5))


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Left: held-out loss by strength. Middle: probe score. Right: what equal scores cost in perplexity."""
    left, middle, right = figure.subplots(1, 3)
    strengths = values["strengths"]
    for label in METHODS:
        curves = [run["curves"][label] for run in values["runs"]]
        relative = [[one / c["loss"][0] for one in c["loss"]] for c in curves]
        mean = [sum(column) / len(column) for column in zip(*relative, strict=True)]
        score = [sum(column) / len(column) for column in zip(*(c["score"] for c in curves), strict=True)]
        left.plot(strengths, mean, "o-", label=label, linewidth=1.2, markersize=3)
        middle.plot(strengths, score, "o-", label=label, linewidth=1.2, markersize=3)
    left.set_xlabel("strength")
    left.set_ylabel("distance to the target, unsteered = 1")
    left.set_title("held-out texts, sum of all places", fontsize=9)
    left.set_ylim(bottom=0)
    left.legend(fontsize=7)
    middle.set_xlabel("strength")
    middle.set_title("probe at the last norm:\nprobability of the target", fontsize=9)
    middle.set_ylim(0, 1)
    utility = values["utility"]
    labels = [label for label in utility if label != "unsteered"]
    means = [sum(one["perplexity"] for one in utility[label]) / len(utility[label]) for label in labels]
    right.bar([label.replace(", ", ",\n") for label in labels], means, color=["C0", "C1", "C3"])
    right.axhline(utility["unsteered"], color="black", linewidth=0.7)
    right.tick_params(axis="x", labelsize=7)
    right.set_title("perplexity of other text,\nequal probe scores (line: unsteered)", fontsize=9)


CLAIM = Claim(
    "lineas",
    "Activation maps trained end to end come closer to the target than maps fitted layer by layer",
    "LinEAS, arXiv 2503.10679",
    run,
    plot,
)
