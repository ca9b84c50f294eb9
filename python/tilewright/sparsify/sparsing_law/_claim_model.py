# SPDX-License-Identifier: Apache-2.0
"""Sparsing Law's claim on SmolLM2: CETT-PPL-p%, the trade-off against other criteria, deployment."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tilewright import data, evaluate, models
from tilewright.capture import tapped
from tilewright.claims import Experiment, Row, at_least, at_most, falling
from tilewright.ops.sparse_gated_mlp import sparse_gated_mlp
from tilewright.sparsify.sparsing_law.measurement import Measurement
from tilewright.sparsify.sparsing_law.method import apply_thresholds, cett_ppl, pareto, sparsity
from tilewright.sparsify.sparsing_law.report import SparsityReport, export_thresholds
from tilewright.sparsify.thresholds import Thresholds, load_thresholds

METRICS = ("cett", "topk", "fat", "cats")
BASELINES = {"topk": "top-k per token", "fat": "one threshold (FAT)", "cats": "a quantile a layer (CATS)"}


class Bench:
    """SmolLM2 in float32, and two disjoint pieces of held-out text."""

    def __init__(self, quick: bool) -> None:
        self.window, self.tokens = (128, 256) if quick else (512, 2048)
        model = models.load(data.smollm2_gguf())
        self.module = models.to_transformers(model, dequantize=True)
        self.text = evaluate.text_corpus(model.tokenizer, "speeches", "evaluation", max_tokens=2 * self.tokens)
        self.sample_rows = 256 if quick else 512

    def batches(self, which: int) -> list[Tensor]:
        """Token batches of one text."""
        piece = self.text[which * self.tokens : (which + 1) * self.tokens]
        return evaluate.token_batches(piece, length=self.window)

    def measurement(self, which: int) -> Measurement:
        """The model on one text."""
        return Measurement(self.module, self.batches(which), sample_rows=self.sample_rows)


def model_rows(experiment: Experiment) -> Iterator[Row]:
    """Items 2, 3 and 6."""
    experiment.say("loading SmolLM2")
    bench = Bench(experiment.quick)
    first = bench.measurement(0)
    yield from metric_rows(experiment, bench, first)
    yield from trade_off_rows(experiment, first)
    yield from deployment_rows(experiment, bench, first)


def metric_rows(experiment: Experiment, bench: Bench, first: Measurement) -> Iterator[Row]:
    """Item 2: the metric at 1, 5 and 10 %, and on a second text."""
    found: dict[float, SparsityReport] = {}
    for p in (1.0,) if experiment.quick else (1.0, 5.0, 10.0):
        experiment.say(f"CETT-PPL-{p:g}%")
        found[p] = cett_ppl(first, p=p)
    experiment.values["cett_ppl"] = {f"{p:g}": report.to_dict() for p, report in found.items()}
    one = found[1.0]
    layers = one.per_layer.values()
    yield Row("CETT-PPL-1%: tail error c", "", one.arg, "reported", True)
    yield Row("CETT-PPL-1%: active neurons", "", one.activation_ratio, "reported", True)
    text = f"{min(layers):.3f} to {max(layers):.3f}"
    yield Row("the same by layer, fewest to most", "", text, "reported", True)
    yield Row("standard error of the loss difference (1 % is 0.00995)", "", one.stderr, "reported", True)
    yield experiment.in_full(at_least("CETT-PPL-1%: perplexity over dense", one.ppl_ratio, 1.008))
    yield experiment.in_full(at_most("CETT-PPL-1%: perplexity over dense ", one.ppl_ratio, 1.012))
    if experiment.quick:
        return
    ratios = [report.activation_ratio for report in found.values()]
    yield falling("active neurons at p = 1, 5, 10 %", ratios)
    experiment.say("second text")
    other = cett_ppl(bench.measurement(1))
    experiment.values["second text"] = other.to_dict()
    yield at_most("second text: difference of c", abs(other.arg - one.arg), 5e-3)
    name = "second text: difference of active neurons"
    yield at_most(name, abs(other.activation_ratio - one.activation_ratio), 5e-3)


def trade_off_rows(experiment: Experiment, first: Measurement) -> Iterator[Row]:
    """Item 3: perplexity at equal shares of active neurons."""
    grid = (0.7, 0.5) if experiment.quick else (0.7, 0.5, 0.4)
    curves: dict[str, list[SparsityReport]] = {}
    for metric in METRICS:
        experiment.say(f"trade-off, {metric}")
        curves[metric] = pareto(first, metric=metric, grid=grid, by="ratio")
    experiment.values["pareto"] = {metric: [one.to_dict() for one in reports] for metric, reports in curves.items()}
    for place, ratio in enumerate(grid):
        cett = curves["cett"][place]
        for metric, name in BASELINES.items():
            other = curves[metric][place]
            text = f"{100 * ratio:.0f} % active: perplexity, CETT {cett.ppl_ratio:.3f} x dense, over {name}"
            yield at_most(text, cett.ppl_sparse / other.ppl_sparse, 1.0)
    half = grid.index(0.5)
    yield experiment.in_full(
        at_most("50 % active, CETT: perplexity over dense", curves["cett"][half].ppl_ratio, 1.10, paper="")
    )
    name = "50 % active, gate thresholds (CATS): perplexity over dense"
    yield experiment.in_full(at_least(name, curves["cats"][half].ppl_ratio, 1.2))
    saved: dict[str, Any] = {"CETT": (2 + 0.5) / 3, "a gate criterion": (1 + 2 * 0.5) / 3}
    for name, share in saved.items():
        yield Row(f"50 % active, {name}: share of the block's weights that must be read", "", share, "reported", True)


def deployment_rows(experiment: Experiment, bench: Bench, first: Measurement) -> Iterator[Row]:
    """Item 6: stored thresholds in the sparse operator against the truncating hook."""
    experiment.say("deployment")
    names = {"cett": "CETT, a token at a time", "cats": "gate thresholds (CATS)"}
    for metric, name in names.items():
        report = sparsity(first, metric=metric, arg=0.1 if metric == "cett" else 0.5)
        with tempfile.TemporaryDirectory() as folder:
            stored = load_thresholds(export_thresholds(report, Path(folder) / "thresholds.safetensors"))
        apart = largest_difference(bench, stored)
        text = f"{name}: sparse_gated_mlp with stored thresholds against the hook, largest relative difference"
        yield at_most(text, apart, 1e-5)


def largest_difference(bench: Bench, stored: Thresholds, tokens: int = 16) -> float:
    """Over three layers: outputs of the operator and of the truncated block on the inputs that the model gives it."""
    layers = [bench.module.model.layers[index].mlp for index in (0, 14, 29)]
    names = [f"model.layers.{index}.mlp" for index in (0, 14, 29)]
    seen: dict[str, Tensor] = {}
    taps: dict[Any, Any] = {f"{name}@input": lambda site, x: seen.setdefault(site, x) for name in names}
    with torch.no_grad(), tapped(bench.module, taps):
        bench.module(bench.text[None, :tokens])
    apart = []
    for name, mlp in zip(names, layers, strict=True):
        x = seen[f"{name}@input"][0]
        with torch.no_grad(), apply_thresholds(bench.module, stored):
            wanted = mlp(x)
        found = through_operator(mlp, x, stored[name], stored.score)
        apart.append(float((found - wanted).abs().max() / wanted.abs().max()))
    return max(apart)


def through_operator(mlp: Any, x: Tensor, bound: Tensor, score: str) -> Tensor:
    """A gated block by the sparse operator, x [T, D] to [T, D].

    The operator compares |s_j|. |h_j| = |s_j| |u_j| < bound is |s_j| < bound / |u_j|, a threshold of each token's own.
    """
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T.contiguous()
    with torch.no_grad():
        if score == "gate":
            return cast("Tensor", sparse_gated_mlp(x, *weights, bound))
        own = bound / mlp.up_proj(x).abs()
        rows = [cast("Tensor", sparse_gated_mlp(x[t, None], *weights, own[t])) for t in range(len(x))]
    return torch.cat(rows)
