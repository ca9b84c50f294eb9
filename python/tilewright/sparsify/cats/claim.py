# SPDX-License-Identifier: Apache-2.0
"""The claim: one threshold a layer drops half of the gate activations at little cost, and no simpler criterion does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row, at_least, at_most, call_with, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tilewright.sparsify.cats._claim_model import Bench
    from tilewright.sparsify.cats.calibrate import Ranking

SPARSITIES = (0.3, 0.5, 0.7, 0.9)
LAYERS = [0, 10, 20, 29]


def run(experiment: Experiment) -> Iterator[Row]:
    """All rows of the claim."""
    from tilewright.sparsify.cats._claim_model import Bench

    experiment.say("loading")
    bench = Bench(experiment.quick)
    yield from exact_rows(bench)
    yield from sparsity_rows(experiment, bench)
    yield from quality_rows(experiment, bench)
    if not experiment.quick:
        yield from generation_rows(experiment, bench)
        yield from tuning_rows(experiment, bench)


def exact_rows(bench: Bench) -> Iterator[Row]:
    """Item 1: the operator against dense products with a mask in float64, on real activations."""
    import torch

    from tilewright.ops import sparse_gated_mlp
    from tilewright.sparsify.cats._claim_model import oracle

    thresholds = bench.scores(method="hist").thresholds(0.5)
    worst = {torch.float32: 0.0, torch.bfloat16: 0.0}
    wrong = 0
    for name, x in bench.inputs(LAYERS).items():
        mlp: Any = bench.mlps[name]
        for dtype in worst:
            weights = [w.detach().to(dtype) for w in (mlp.gate.weight, mlp.up.weight, mlp.down.weight.T.contiguous())]
            gate, up, down_t = weights
            x_in = x.to(dtype)
            exact, size, off = oracle(x_in, thresholds[name], weights)
            y, kept = sparse_gated_mlp(x_in, gate, up, down_t, thresholds[name], return_kept=True)
            wanted = ~(size < thresholds[name].double())
            # Where |a| is farther from the threshold than float32 can be off, both must agree.
            wrong += int((kept != wanted)[(size - thresholds[name].double()).abs() > off].sum())
            flips = (kept != wanted).any(-1)
            error = ((y.double() - exact).abs().amax(-1) / exact.abs().amax(-1))[~flips]
            worst[dtype] = max(worst[dtype], float(error.max()))
    yield at_most("operator, real activations, float32: largest error of a token", worst[torch.float32], 1e-5)
    yield at_most("operator, real activations, bfloat16: largest error of a token", worst[torch.bfloat16], 1e-2)
    yield at_most("operator: masks that differ beyond rounding", wrong, 0)


def sparsity_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 2: what is dropped on the calibration text and on the held-out one."""
    from tilewright.sparsify.cats.apply import sparsity_report

    experiment.say("achieved sparsity")
    scores, streamed = bench.scores(), bench.scores(method="hist")
    held_out = [bench.text[None, :]]
    found: dict[str, list[float]] = {}
    for k, most in ((0.5, 0.04), (0.7, None), (0.9, 0.08)):
        made = scores.thresholds(k)
        own = [one.sparsity for one in sparsity_report(bench.module, bench.batches[0], made)]
        other = [one.sparsity for one in sparsity_report(bench.module, held_out, made)]
        binned = [one.sparsity for one in sparsity_report(bench.module, bench.batches[0], streamed.thresholds(k))]
        found[str(k)] = other
        mean = sum(other) / len(other)
        yield at_most(f"k = {k}, calibration text: largest difference from k", max(abs(s - k) for s in own), 0.001)
        difference = max(abs(s - t) for s, t in zip(own, binned, strict=True))
        yield at_most(f"k = {k}: histogram against exact threshold, largest difference", difference, 0.002)
        yield experiment.in_full(at_most(f"k = {k}, held-out text: mean over layers off by", abs(mean - k), 0.03))
        if most is not None:
            worst = max(abs(s - k) for s in other)
            yield experiment.in_full(at_most(f"k = {k}, held-out text: worst layer off by", worst, most))
    experiment.values["held-out sparsity"] = found


Found = dict[tuple[str, float], tuple[float, float]]
"""Perplexity on the held-out text and mean sparsity there, by criterion and sparsity."""

RANKED: dict[str, tuple[Ranking, bool]] = {
    "CATS": ("activation", False),
    "global threshold": ("activation", True),
    "CATS, norm-weighted": ("norm", False),
    "CATS, up-weighted": ("up", False),
    "global threshold, up-weighted": ("up", True),
    "output size (reads up)": ("output", False),
}
"""Forms with thresholds: what they rank by, and whether one threshold serves all layers."""


def ranked(ranking: Ranking, text: int, grid: Sequence[float], bench: Bench) -> Found:
    """Every form of a ranking, by scores of one calibration text."""
    scores = bench.scores(ranking, text)
    return {
        (form, k): bench.dropped_by(scores, k, everywhere)
        for form, (by, everywhere) in RANKED.items()
        if by == ranking
        for k in grid
    }


def unranked(form: str, k: float, bench: Bench) -> Found:
    """A form without thresholds."""
    from tilewright.sparsify.cats.baselines import random_mask, relu_swap, top_k

    if form == "dense":
        return {(form, k): (bench.perplexity(), 0.0)}
    if form == "ReLU swap":
        return {(form, k): bench.dropped(relu_swap(), "relu")}
    keep = top_k(k) if form == "top-k a token" else random_mask(k, int(form.rpartition(" ")[2]))
    return {(form, k): bench.dropped(keep)}


def perplexities(experiment: Experiment, bench: Bench) -> list[Found]:
    """All forms by thresholds of the first and of the second calibration text; those without are with the first."""
    grid = (0.5, 0.7) if experiment.quick else SPARSITIES
    texts = range(1 if experiment.quick else 2)
    works: list[tuple[int, Callable[[Bench], Found]]] = [
        (text, partial(ranked, one, text, sorted({0.3, *grid}) if one == "activation" else grid))
        for text in texts
        for one in ("activation", "up", "norm")
    ]
    others = [("dense", 0.0), ("ReLU swap", 0.0), ("random mask, seed 0", 0.3)]
    if not experiment.quick:
        works.append((0, partial(ranked, "output", 0, grid)))
        others += [("random mask, seed 1", 0.3), ("random mask, seed 0", 0.5), ("random mask, seed 0", 0.7)]
        others += [("top-k a token", k) for k in grid]
    works += [(0, partial(unranked, form, k)) for form, k in others]
    done = spread(call_with, [work for _, work in works], partial(type(bench), experiment.quick), own=bench)
    found: list[Found] = [{} for _ in texts]
    for (text, _), some in zip(works, done, strict=True):
        found[text] |= some
    return found


def quality_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 3: perplexity against every other criterion at the same sparsity."""
    experiment.say("perplexity of every criterion")
    found = perplexities(experiment, bench)
    dense = found[0]["dense", 0.0][0]
    yield Row(f"perplexity, dense, {bench.tokens} tokens", "", dense, "reported", True)
    ratios: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}
    for text, some in enumerate(found):
        for (form, k), (perplexity, dropped) in some.items():
            name = form if text == 0 else f"{form}, second calibration text"
            ratios.setdefault(name, {})[str(k)] = perplexity / dense
            shares.setdefault(name, {})[str(k)] = dropped
    experiment.values |= {"dense": dense, "ratios": ratios, "shares": shares}
    swapped = ratios["ReLU swap"]["0.0"]
    for text in range(len(found)):
        suffix = "" if text == 0 else ", second calibration text"
        for k in (0.5, 0.7) if experiment.quick else SPARSITIES:
            cats, fat, norm, up, up_fat = (ratios[f"{form}{suffix}"][str(k)] for form in list(RANKED)[:5])
            yield from _compared(k, cats, fat, swapped, suffix)
            yield at_most(f"k = {k}{suffix}: weighted by up activations over CATS", up / cats, 1.0)
            yield at_most(f"k = {k}{suffix}: the same over its global threshold", up / up_fat, 1.0, paper="below 1")
            yield Row(f"k = {k}{suffix}: weighted by norms over CATS", "", norm / cats, "reported", True)
    for name, key in (("the output's size", "output size (reads up)"), ("top-k a token", "top-k a token")):
        for share, ratio in ratios.get(key, {}).items():
            yield Row(f"k = {share}: perplexity ratio of {name}", "", ratio, "reported", True)
    first = ratios["CATS"]
    for seed in (0,) if experiment.quick else (0, 1):
        random = ratios[f"random mask, seed {seed}"]["0.3"]
        yield at_least(f"k = 0.3: random mask, seed {seed}, over CATS", random / first["0.3"], 20, paper="32.5 / 1.044")
    yield experiment.in_full(at_most("k = 0.3: perplexity ratio", first["0.3"], 1.07, paper="1.01 at 0.5 (7B)"))
    yield experiment.in_full(at_most("k = 0.5: perplexity ratio", first["0.5"], 1.35, paper="1.01 (7B)"))


def _compared(k: float, cats: float, fat: float, swapped: float, suffix: str) -> Iterator[Row]:
    yield at_most(f"k = {k}{suffix}: CATS over global threshold", cats / fat, 1.0, paper="below 1")
    if k <= 0.7:
        yield at_most(f"k = {k}{suffix}: CATS over ReLU swap", cats / swapped, 0.1, paper="0.71 (7B, perplexity)")
    yield Row(f"k = {k}{suffix}: perplexity ratio of CATS", "", cats, "reported", True)


def generation_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 5: greedy tokens of the sparse path are those of dense products with a mask."""
    from tilewright.models.engine import Engine
    from tilewright.models.image import compile
    from tilewright.sparsify.cats.apply import apply_cats, remove_cats
    from tilewright.sparsify.cats.baselines import sparsified, thresholded
    from tilewright.sparsify.cats.method import with_thresholds

    experiment.say("greedy generation")
    thresholds = bench.scores(method="hist").thresholds(0.5)
    prompt = bench.text[None, :32]
    options: dict[str, Any] = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    apply_cats(bench.module, thresholds)
    sparse = bench.module.generate(prompt, **options)
    remove_cats(bench.module)
    with sparsified(bench.module, thresholded(thresholds)):
        masked = bench.module.generate(prompt, **options)
    same = int((sparse == masked)[0, 32:].sum())
    yield at_least("64 greedy tokens, operator against dense with a mask: equal", same, 64)
    made = with_thresholds(bench.model, thresholds)
    logits = [
        Engine(compile(made, "int8", "bf16", sparse=by_rows), 96).generate(prompt[0].tolist(), max_new_tokens=64)
        for by_rows in (True, False)
    ]
    one, other = (list(tokens) for tokens in logits)
    equal = sum(a == b for a, b in zip(one, other, strict=True))
    yield at_least("64 greedy tokens, engine (4 bit) by rows against all rows: equal", equal, len(one))


def tuning_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 6: 100 steps of LoRA at 70 % sparsity."""
    import copy

    from tilewright.evaluate import token_batches
    from tilewright.sparsify.cats.apply import apply_cats
    from tilewright.sparsify.cats.tuning import Tuning, finetune

    experiment.say("fine-tuning, 100 steps")
    made = apply_cats(copy.deepcopy(bench.module), bench.scores(method="hist").thresholds(0.7))
    before = bench.perplexity(made)
    losses = finetune(made, token_batches(bench.training, length=128, count=100), Tuning(accumulation=1))
    after = bench.perplexity(made.eval())
    dense = experiment.values["dense"]
    experiment.values["tuning"] = {"before": before / dense, "after": after / dense, "losses": losses}
    yield at_most("k = 0.7: perplexity after 100 steps of LoRA, over before", after / before, 0.98)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Left: perplexity ratio by sparsity. Right: sparsity of each layer on the held-out text."""
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    forms = {
        "CATS": "o-", "CATS, norm-weighted": "s-", "CATS, up-weighted": "P-", "global threshold": "^--",
        "top-k a token": "v:", "output size (reads up)": "d-", "random mask, seed 0": "x--",
    }  # fmt: skip
    for form, style in forms.items():
        if found := values["ratios"].get(form):
            points = sorted((float(k), ratio) for k, ratio in found.items())
            left.plot([100 * k for k, _ in points], [r for _, r in points], style, label=form, markersize=4)
    left.axhline(values["ratios"]["ReLU swap"]["0.0"], color="grey", linestyle=":", label="ReLU swap")
    if "tuning" in values:
        left.plot([70], [values["tuning"]["after"]], "*", markersize=11, label="CATS, 100 steps of LoRA")
    left.set_yscale("log")
    left.set_xlabel("neurons dropped, %")
    left.set_ylabel("perplexity over dense")
    left.set_title("SmolLM2-135M, held-out speeches")
    left.legend(fontsize=7)
    for k, shares in values["held-out sparsity"].items():
        right.plot([100 * s for s in shares], label=f"threshold for {100 * float(k):.0f} %")
        right.axhline(100 * float(k), color="black", linewidth=0.5)
    right.set_xlabel("layer")
    right.set_title("dropped on held-out text, %")
    right.legend(fontsize=7)


CLAIM = Claim(
    "cats",
    "A threshold a layer on the gate activation drops half of an MLP's neurons",
    "CATS, arXiv 2404.08763",
    run,
    plot,
)
