# SPDX-License-Identifier: Apache-2.0
"""The claim: one threshold a layer drops half of the gate activations at little cost, and no simpler criterion does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row, at_least, at_most

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tilewright.sparsify.cats._claim_model import Bench

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


def quality_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 3: perplexity against every other criterion at the same sparsity."""
    from tilewright.sparsify.cats.baselines import random_mask, relu_swap, top_k

    experiment.say("perplexity, dense")
    dense = bench.perplexity()
    yield Row(f"perplexity, dense, {bench.tokens} tokens", "", dense, "reported", True)
    ratios: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}

    def put(form: str, k: float, found: tuple[float, float]) -> float:
        ratios.setdefault(form, {})[str(k)] = found[0] / dense
        shares.setdefault(form, {})[str(k)] = found[1]
        return found[0] / dense

    experiment.values |= {"dense": dense, "ratios": ratios, "shares": shares}
    swapped = put("ReLU swap", 0.0, bench.dropped(relu_swap(), "relu"))
    grid = (0.5, 0.7) if experiment.quick else SPARSITIES
    texts = 1 if experiment.quick else 2
    for which in range(texts):
        scores, normed, upped = (bench.scores(ranking, which) for ranking in ("activation", "norm", "up"))
        suffix = "" if which == 0 else ", second calibration text"
        for k in grid:
            experiment.say(f"perplexity, sparsity {k}{suffix}")
            cats = put(f"CATS{suffix}", k, bench.dropped_by(scores, k))
            fat = put(f"global threshold{suffix}", k, bench.dropped_by(scores, k, everywhere=True))
            norm = put(f"CATS, norm-weighted{suffix}", k, bench.dropped_by(normed, k))
            up = put(f"CATS, up-weighted{suffix}", k, bench.dropped_by(upped, k))
            up_fat = put(f"global threshold, up-weighted{suffix}", k, bench.dropped_by(upped, k, everywhere=True))
            yield from _compared(k, cats, fat, swapped, suffix)
            yield at_most(f"k = {k}{suffix}: weighted by up activations over CATS", up / cats, 1.0)
            yield at_most(f"k = {k}{suffix}: the same over its global threshold", up / up_fat, 1.0, paper="below 1")
            yield Row(f"k = {k}{suffix}: weighted by norms over CATS", "", norm / cats, "reported", True)
    first = ratios["CATS"]
    if not experiment.quick:
        oracle = bench.scores("output")
        for k in grid:
            experiment.say(f"perplexity, other criteria, sparsity {k}")
            put("top-k a token", k, bench.dropped(top_k(k)))
            found = put("output size (reads up)", k, bench.dropped_by(oracle, k))
            yield Row(f"k = {k}: perplexity ratio of the output's size", "", found, "reported", True)
            yield Row(
                f"k = {k}: perplexity ratio of top-k a token", "", ratios["top-k a token"][str(k)], "reported", True
            )
    seeds = (0,) if experiment.quick else (0, 1)
    if "0.3" not in first:
        put("CATS", 0.3, bench.dropped_by(bench.scores(), 0.3))
    for seed in seeds:
        experiment.say(f"random mask, seed {seed}")
        random = put(f"random mask, seed {seed}", 0.3, bench.dropped(random_mask(0.3, seed)))
        yield at_least(f"k = 0.3: random mask, seed {seed}, over CATS", random / first["0.3"], 20, paper="32.5 / 1.044")
    if not experiment.quick:
        for k in (0.5, 0.7):
            put("random mask, seed 0", k, bench.dropped(random_mask(k, 0)))
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
