# SPDX-License-Identifier: Apache-2.0
"""What the analysis of hybrid linear attention found, at a small scale: recall, language loss, rankings, cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from statistics import mean
from typing import TYPE_CHECKING, Any

from tilewright.claims import Claim, Experiment, Row, at_least, at_most
from tilewright.nn.hybrid_linear_attention.study import FULL, MIXERS, SOFTMAX, Outcome, Setting, Study, run_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRIX_STATES = tuple(mixer for mixer in MIXERS if mixer != "hgrn")
RECALL = Study(
    Setting(
        task="kv",
        num_layers=4,
        hidden_size=32,
        num_heads=2,
        steps=800,
        batch=16,
        length=56,
        pairs=24,
        vocabulary=125,
        short_conv=False,
        initializer_range=0.1,
    ),
    MIXERS,
    ("pure", "3:1", "full"),
    (1.5e-3, 3e-3, 6e-3),
    seeds=3,
    tune="cell",
)
TEXT = Study(
    Setting(
        task="lm",
        num_layers=8,
        hidden_size=32,
        num_heads=2,
        initializer_range=0.1,
        steps=100,
        batch=8,
        length=128,
        evaluation=64,
    ),
    MIXERS,
    ("pure", "7:1", "3:1", "1:1", "full"),
    (3e-3, 6e-3, 1.2e-2),
    seeds=3,
    tune="mixer",
)


def run(experiment: Experiment) -> Iterator[Row]:
    """Exactness, costs, and two studies: recall and text."""
    from tilewright.nn.hybrid_linear_attention import _claim_cost, _claim_exact

    yield from _claim_exact.loop_rows(experiment)
    yield from _claim_exact.oracle_rows(experiment)
    yield from _claim_exact.model_rows(experiment)
    yield from _claim_cost.counting_rows(experiment)
    yield from _claim_cost.memory_rows(experiment)
    yield from _claim_cost.decode_rows(experiment)
    yield from distance_rows(experiment)
    yield from recall_rows(experiment)
    yield from text_rows(experiment)


def recall_rows(experiment: Experiment) -> Iterator[Row]:
    """Findings 1, 3, 4 and 8 on recall of 24 pairs, each mixer and ratio at its best rate."""
    outcome = _study(experiment, "recall", _small(RECALL, steps=30) if experiment.quick else RECALL)
    if experiment.quick:
        yield Row("recall study: trainings done", "", float(len(outcome.records)), "> 0", bool(outcome.records))
        return
    pure, hybrid = (mean(outcome.mean(m, ratio) for m in MATRIX_STATES) for ratio in ("pure", "3:1"))
    softmax = outcome.mean(SOFTMAX, FULL)
    yield at_least(
        "recall, matrix-state mixers: mean accuracy at 3:1 over pure", hybrid - pure, 0.15, paper=".397 / .256"
    )
    yield at_least("recall: mean accuracy at 3:1 over all softmax", hybrid - softmax, -0.05, paper=".397 / .42")
    by_mixer = {mixer: outcome.mean(mixer, "pure") for mixer in MIXERS}
    delta = min(by_mixer["deltanet"], by_mixer["gated_deltanet"])
    ungated = max(by_mixer["retnet"], by_mixer["hgrn"])
    yield at_least("recall, pure: DeltaNet and Gated DeltaNet over RetNet and HGRN", delta - ungated, 0.2)
    others = min(by_mixer[mixer] for mixer in MATRIX_STATES)
    # Two standard errors of a difference of two shares at chance, 3 seeds of 256 sequences of 24 queries each.
    noise = 2 * sqrt(2 * 0.25 * 0.75 / (3 * 256 * 24))
    yield at_most("recall, pure: HGRN over the worst of the others", by_mixer["hgrn"] - others, noise)
    yield _rankings("recall", outcome, "3:1")
    shares = {mixer: _near_and_far(outcome, mixer) for mixer in ("retnet", "deltanet")}
    experiment.values["near and far"] = shares
    text = "; ".join(f"{mixer} {near:.3f} and {far:.3f}" for mixer, (near, far) in shares.items())
    yield Row("recall, pure: accuracy in the nearest and the farthest quarter of distances", "", text, "reported", True)


def _near_and_far(outcome: Outcome, mixer: str) -> tuple[float, float]:
    """Accuracy of the pure stack in the nearest and the farthest quarter of distances, mean over seeds."""
    curves = [list(record["by_distance"].values()) for record in outcome.chosen(mixer, "pure")]
    quarter = max(1, len(curves[0]) // 4)
    return mean(mean(c[:quarter]) for c in curves), mean(mean(c[-quarter:]) for c in curves)


def distance_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 8: what is left of a value after d other tokens: gamma^d in retention, all of it under the delta rule."""
    import torch

    from tilewright.ops import chunk_delta_rule, chunk_retention

    experiment.say("what is left of a value with distance")
    size, heads = 64, 4
    keys = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0]
    k = keys[None, :, None].expand(1, size, heads, size)
    v = torch.randn(1, size, heads, 8, generator=torch.Generator().manual_seed(1))
    q = k[:, :1].expand_as(k)  # every token asks for the first one's value
    left = {}
    for name, out in (
        ("retnet", chunk_retention(q, k, v, scale=1.0)[0]),
        ("deltanet", chunk_delta_rule(q, k, v, torch.ones(1, size, heads), scale=1.0)[0]),
    ):
        left[name] = (out[0] * v[0, :1]).sum(-1) / v[0, :1].square().sum(-1)
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    predicted = gamma ** torch.arange(size)[:, None]
    experiment.values["left at a distance"] = {name: share.T.tolist() for name, share in left.items()}
    off = float((left["retnet"].double() / predicted - 1).abs().max())
    yield at_most("retention: share left of a value after d tokens, against gamma^d", off, 1e-4)
    yield at_most("delta rule, orthogonal keys: the same, against 1", float((left["deltanet"] - 1).abs().max()), 1e-4)


def text_rows(experiment: Experiment) -> Iterator[Row]:
    """Findings 2 and 3 on bytes of text."""
    study = replace(_small(TEXT, steps=6), mixers=("gla", "deltanet")) if experiment.quick else TEXT
    outcome = _study(experiment, "text", study)
    if experiment.quick:
        yield Row("text study: trainings done", "", float(len(outcome.records)), "> 0", bool(outcome.records))
        return
    hybrids = [ratio for ratio in study.ratios if ratio not in ("pure", FULL)]
    spreads, behind = {}, {}
    for mixer in MIXERS:
        losses = [outcome.mean(mixer, ratio) for ratio in hybrids]
        spreads[mixer] = max(losses) / min(losses) - 1
        behind[mixer] = outcome.mean(mixer, "pure") / min(losses) - 1
    experiment.values["spread of loss"] = {"over hybrid ratios": spreads, "pure behind best": behind}
    title = f"text: spread of the held-out loss over {', '.join(hybrids)}, largest of the mixers"
    yield at_most(title, max(spreads.values()), 0.03, paper=".475 to .480 (accuracy)")
    yield at_most("text: pure behind the best ratio, largest of the mixers", max(behind.values()), 0.05)
    yield _rankings("text", outcome, "3:1")


def _small(study: Study, steps: int) -> Study:
    """The same grid with one seed, one rate, narrow layers and a few steps: it shows that the study runs."""
    setting = replace(study.setting, steps=steps, num_layers=4, batch=4, evaluation=64, hidden_size=32)
    return replace(study, setting=setting, rates=study.rates[1:2], seeds=1, ratios=("pure", "3:1", "full"))


def _study(experiment: Experiment, name: str, study: Study) -> Outcome:
    from tilewright.nn.delta_rule._claim_tools import cores

    experiment.say(f"{name}: {len(study.groups)} groups, {len(study.rates)} rates, {study.seeds} seeds")
    outcome = run_study(study, workers=1 if experiment.quick else cores(), say=experiment.say)
    content = outcome.to_dict()
    experiment.values[name] = {key: content[key] for key in ("study", "groups")}
    experiment.values[f"{name} by distance"] = {
        mixer: [record["by_distance"] for record in outcome.chosen(mixer, ratio)]
        for mixer, ratio in study.groups
        if ratio in ("pure", FULL) and "by_distance" in outcome.chosen(mixer, ratio)[0]
    }
    return outcome


def _rankings(name: str, outcome: Outcome, hybrid: str) -> Row:
    """Finding 3: both rankings and their Kendall tau; reported without a threshold."""
    orders = [f"{ratio}: {' > '.join(outcome.ranking(ratio))}" for ratio in ("pure", hybrid)]
    text = f"{'; '.join(orders)}; Kendall's tau {outcome.tau('pure', hybrid):.2f}"
    return Row(f"{name}: ranking alone and in the hybrid", "they differ", text, "reported", True)


def plot(values: dict[str, Any], figure: Figure) -> None:
    """Accuracy and loss by ratio, and accuracy by distance."""
    axes = figure.subplots(1, 3)
    for axis, name, what in zip(axes, ("recall", "text"), ("accuracy", "loss, nats per byte"), strict=False):
        groups = values[name]["groups"]
        ratios = [r for r in values[name]["study"]["ratios"] if r != FULL]
        for mixer in values[name]["study"]["mixers"]:
            means = [mean(g["scores"]) for r in ratios for g in groups if (g["mixer"], g["ratio"]) == (mixer, r)]
            axis.plot(ratios, means, marker="o", label=mixer)
        axis.axhline(mean(groups[-1]["scores"]), color="black", linestyle="--", label="softmax")
        axis.set_xlabel("linear : full")
        axis.set_ylabel(f"{name}: {what}")
    axes[0].legend(fontsize=7)
    for mixer, curves in values["recall by distance"].items():
        distances = sorted(curves[0], key=int)
        axes[2].plot([int(d) for d in distances], [mean(c[d] for c in curves) for d in distances], label=mixer)
    axes[2].set_xlabel("tokens from key to query")
    axes[2].set_ylabel("recall: accuracy, pure stacks")


CLAIM = Claim(
    "hybrid-linear-attention",
    "Few full-attention layers restore recall, cost little, and leave language loss as it was",
    "A Systematic Analysis of Hybrid Linear Attention, arXiv 2507.06457",
    run,
    plot,
)
