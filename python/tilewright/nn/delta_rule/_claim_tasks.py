# SPDX-License-Identifier: Apache-2.0
"""What the delta rule can learn that adding cannot: recall of rewritten values, and parity with negative eigenvalues.

Competitors get the same model around the mixer, the same data and the same search over learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.claims import Experiment, Row, at_least, at_most
from tilewright.data.recall import BLANK, IGNORE, Batch, Curriculum, Stream, mix, multi_query_recall, parity
from tilewright.nn.delta_rule._claim_tools import cores, in_parallel
from tilewright.nn.delta_rule.delta_net import DeltaNet
from tilewright.nn.linear_attention import LinearAttention
from tilewright.nn.mixer import Sequences, convolve

WIDTH, LAYERS, HEADS = 64, 2, 4
RATES = (2e-3, 5e-3, 1e-2)
RECALL_RATES = (5e-3, 1e-2, 2e-2)
SEEDS = 3
QUICK, QUICK_STEPS = ("parity",), 150
EVALUATION_SEED = 1 << 20


class WithoutErasing(DeltaNet):
    """A DeltaNet layer that writes k (beta v)^T: all of the delta rule but -beta k (S^T k)^T."""

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        from tilewright import ops

        del keep_state
        streams = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        (q, k, v), _ = convolve(self.conv, streams, F.silu, state, sequences)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        beta = torch.sigmoid(self.b_proj(x))[..., None]
        q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
        o, _ = ops.linear_attention(q, k, beta * v)
        return self.o_proj(self.o_norm(o).flatten(-2)), {}


@dataclass(frozen=True)
class Heads:
    """How many, and the numbers of a key and of a value in each."""

    count: int = HEADS
    key: int = WIDTH // HEADS
    value: int = WIDTH // HEADS

    def options(self) -> dict[str, Any]:
        """Arguments of the layers."""
        return {
            "num_heads": self.count,
            "expand_k": self.count * self.key / WIDTH,
            "expand_v": self.count * self.value / WIDTH,
        }


# A model can make up for few keys by a code of its own over many values, and the rules then differ little; with few
# values the noise of a read decides.
NARROW = Heads(1, 24, 4)
MIXERS: dict[str, Any] = {
    "DeltaNet": lambda sizes: DeltaNet(WIDTH, **sizes),
    "without erasing": lambda sizes: WithoutErasing(WIDTH, **sizes),
    "linear attention": lambda sizes: LinearAttention(WIDTH, use_short_conv=True, **sizes),
    "beta in (0, 2)": lambda sizes: DeltaNet(WIDTH, allow_neg_eigval=True, use_short_conv=False, **sizes),
    "beta in (0, 1)": lambda sizes: DeltaNet(WIDTH, use_short_conv=False, **sizes),
}


class Model(nn.Module):
    """Embedding, blocks of pre-normed mixer and MLP, and a linear output."""

    def __init__(self, vocabulary: int, mixer: str, heads: Heads | None = None) -> None:
        super().__init__()
        options = (heads or Heads()).options()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList()
        for _ in range(LAYERS):
            mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            self.blocks.append(nn.ModuleList((nn.RMSNorm(WIDTH), MIXERS[mixer](options), nn.RMSNorm(WIDTH), mlp)))
        self.norm, self.out = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of tokens [B, T]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            norm, mixer, mlp_norm, mlp = block.children()
            x = x + mixer(norm(x))[0]
            x = x + mlp(mlp_norm(x))
        out: Tensor = self.out(self.norm(x))
        return out


def rewritten_recall(
    batch: int, seed: int, *, length: int = 64, keys: int = 8, writes: int = 24, vocabulary: int = 64
) -> Batch:
    """MQAR whose keys are written again and again: ``writes`` pairs over ``keys`` keys, then every key is asked.

    The label of a query is the value last written under it. Alphabet as in ``multi_query_recall``.
    """
    random = torch.Generator().manual_seed(seed)
    names = 1 + torch.rand(batch, vocabulary // 2 - 1, generator=random).argsort(1)[:, :keys]
    # Every key is written at least once, the others at random, in a random order.
    which = torch.cat(
        (torch.arange(keys).expand(batch, -1), torch.randint(keys, (batch, writes - keys), generator=random)), 1
    )
    which = which.gather(1, torch.rand(batch, writes, generator=random).argsort(1))
    values = torch.randint(vocabulary // 2, vocabulary, (batch, writes), generator=random)
    inputs, labels = torch.full((batch, length), BLANK), torch.full((batch, length), IGNORE)
    inputs[:, 0 : 2 * writes : 2] = names.gather(1, which)
    inputs[:, 1 : 2 * writes : 2] = values
    current = torch.zeros(batch, keys, dtype=torch.int64)
    for t in range(writes):
        current.scatter_(1, which[:, t : t + 1], values[:, t : t + 1])
    asked = torch.rand(batch, keys, generator=random).argsort(1)
    places = 2 * writes + torch.rand(batch, length - 2 * writes, generator=random).argsort(1)[:, :keys]
    inputs.scatter_(1, places, names.gather(1, asked))
    labels.scatter_(1, places, current.gather(1, asked))
    return inputs, labels


TASKS: dict[str, Callable[..., Batch]] = {"mqar": multi_query_recall, "rewritten": rewritten_recall, "parity": parity}


@dataclass(frozen=True)
class Run:
    """One training: a mixer on a task with one rate and seed; positions before `judged_from` do not count."""

    task: str
    settings: dict[str, int] = field(hash=False)
    vocabulary: int
    mixer: str
    rate: float
    seed: int
    steps: int
    batch: int = 32
    judged_from: int = 0
    marks: int = 10
    heads: Heads = field(default_factory=Heads)


def execute(run: Run) -> dict[str, Any]:
    """Train, and return the accuracy by position at the end and its mean at `marks` moments on the way."""
    torch.manual_seed(mix(run.seed, 7))
    model = Model(run.vocabulary, run.mixer, run.heads)

    def measure(model: nn.Module) -> Tensor:
        return accuracy(model, Stream(TASKS[run.task], 64, EVALUATION_SEED, run.settings), 4)

    curve = _recall_curve(run, model) if run.task == "mqar" else _curve(run, model, measure)
    by_position = measure(model.eval()).tolist()
    return {"mixer": run.mixer, "rate": run.rate, "seed": run.seed, "curve": curve, "by_position": by_position}


def _recall_curve(run: Run, model: nn.Module) -> list[tuple[int, float]]:
    """Train by the recipe that the claims share."""
    from tilewright.train.recall import RecallRecipe, train_recall

    recipe = RecallRecipe(Curriculum(run.settings["pairs"], run.steps, run.batch, run.vocabulary))
    return train_recall(model, recipe, run.rate, run.seed, marks=run.marks).curve


def _curve(run: Run, model: nn.Module, measure: Callable[[nn.Module], Tensor]) -> list[tuple[int, float]]:
    from tilewright.train import TrainConfig, Trainer

    config = TrainConfig(
        run.steps,
        run.rate,
        warmup=run.steps // 10,
        final_lr=0.0,
        weight_decay=0.01,
        evaluate_every=run.steps // run.marks,
        seed=run.seed,
    )

    def evaluate(model: nn.Module) -> float:
        return 1.0 - float(measure(model).nanmean())

    batches = Stream(TASKS[run.task], run.batch, run.seed, run.settings)
    result = Trainer(model, batches, config, evaluate=evaluate, progress=False).run()
    return [(int(e["step"]), 1.0 - e["loss"]) for e in result.evaluations]


@torch.no_grad()
def accuracy(model: nn.Module, batches: Stream, count: int) -> Tensor:
    """Share of right answers by position [T]; NaN where nothing is asked."""
    right, asked = torch.zeros(1), torch.zeros(1)
    for step in range(count):
        inputs, labels = batches(step)
        counted = labels != IGNORE
        right = right + ((model(inputs).argmax(-1) == labels) & counted).sum(0)
        asked = asked + counted.sum(0)
    return right / asked


def score(outcome: dict[str, Any], first: int = 0) -> float:
    """Mean accuracy over the positions from `first` on at which something is asked."""
    return mean(x for x in outcome["by_position"][first:] if x == x)


@dataclass(frozen=True)
class Contest:
    """Two mixers on one task: the first must reach `high`, the second stay below it by `gap` or below `low`.

    `beside` is only reported.
    """

    run: Run
    first: str
    second: str
    high: float
    gap: float = 0.0
    low: float = 1.0
    beside: str = ""
    rates: tuple[float, ...] = RATES

    def runs(self, rates: tuple[float, ...] = ()) -> dict[str, list[Run]]:
        """The first seed's runs of every mixer, one a rate; the contest's own rates unless given."""
        names = (self.first, self.second, *([self.beside] if self.beside else []))
        return {name: [replace(self.run, mixer=name, rate=rate) for rate in rates or self.rates] for name in names}


CONTESTS = {
    "mqar": Contest(
        Run("mqar", {"length": 48, "pairs": 16}, 64, "", 0.0, 0, 500, heads=NARROW),
        "DeltaNet",
        "linear attention",
        0.95,
        gap=0.2,
        beside="without erasing",
        rates=RECALL_RATES,
    ),
    "rewritten": Contest(Run("rewritten", {}, 64, "", 0.0, 0, 500), "DeltaNet", "without erasing", 0.95, gap=0.2),
    "parity": Contest(
        Run("parity", {"length": 64}, 2, "", 0.0, 0, 300, judged_from=32),
        "beta in (0, 2)",
        "beta in (0, 1)",
        0.98,
        low=0.7,
    ),
}
TITLES = {
    "mqar": "recall of 16 pairs",
    "rewritten": "recall of 8 keys written 24 times",
    "parity": "parity at positions 32 to 64",
}


def learning_rows(experiment: Experiment) -> Iterator[Row]:
    """Items 5 and 6: accuracy of both sides of every contest at their best rates, the worse of the seeds."""
    seeds = 1 if experiment.quick else SEEDS
    chosen = {name: CONTESTS[name] for name in (QUICK if experiment.quick else CONTESTS)}
    experiment.say(f"training: {', '.join(chosen)}")
    rates = RATES[1:2] if experiment.quick else ()
    runs = {(task, name): some for task, c in chosen.items() for name, some in c.runs(rates).items()}
    if experiment.quick:
        runs = {name: [replace(run, steps=QUICK_STEPS) for run in some] for name, some in runs.items()}
    found = tuned(runs, seeds, workers=1 if experiment.quick else cores())
    experiment.values["learning"] = {f"{task}: {name}": outcomes for (task, name), outcomes in found.items()}
    for task, contest in chosen.items():
        first, second = (
            [score(o, contest.run.judged_from) for o in found[task, name]] for name in (contest.first, contest.second)
        )
        yield at_least(f"{TITLES[task]}: {contest.first}, worst seed", min(first), contest.high)
        if contest.gap:
            name = f"{TITLES[task]}: {contest.first} over {contest.second}, worst seed against best"
            yield at_least(name, min(first) - max(second), contest.gap)
        if contest.beside:
            others = [score(o, contest.run.judged_from) for o in found[task, contest.beside]]
            yield Row(f"{TITLES[task]}: {contest.beside}, worst seed", "", min(others), "reported", True)
        if contest.low < 1.0:
            yield at_most(f"{TITLES[task]}: {contest.second}, best seed", max(second), contest.low)


def tuned(runs: dict[Any, list[Run]], seeds: int, workers: int) -> dict[Any, list[dict[str, Any]]]:
    """For each competitor (its runs of seed 0, one a rate) the outcomes of all seeds at the rate that scored best."""
    flat = [run for some in runs.values() for run in some]
    outcomes = dict(zip(flat, in_parallel(execute, flat, workers), strict=True))
    best = {name: max(some, key=lambda run: score(outcomes[run], run.judged_from)) for name, some in runs.items()}
    more = [replace(run, seed=seed) for run in best.values() for seed in range(1, seeds)]
    outcomes |= dict(zip(more, in_parallel(execute, more, workers), strict=True))
    return {name: [outcomes[replace(best[name], seed=seed)] for seed in range(seeds)] for name in runs}
