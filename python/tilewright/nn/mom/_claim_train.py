# SPDX-License-Identifier: Apache-2.0
"""What small models of mixtures of memories learn, beside one memory of equal state or of equal active parameters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.claims import Experiment, Row, at_least, at_most
from tilewright.data.bytes import VOCABULARY, ByteWindows, byte_text, held_out_windows
from tilewright.data.recall import Curriculum, key_value_recall
from tilewright.nn.delta_rule._claim_tools import cores, in_parallel
from tilewright.nn.hybrid_linear_attention.configuration import HybridConfig
from tilewright.nn.hybrid_linear_attention.modeling import HybridForCausalLM
from tilewright.nn.mom.configuration import MomConfig
from tilewright.nn.mom.modeling import MomForCausalLM
from tilewright.nn.mom.routing import mom_route
from tilewright.train import TrainConfig, Trainer
from tilewright.train.losses import Loss, token_loss
from tilewright.train.recall import RecallRecipe, train_recall

MEMORIES, TOPK = 4, 2
SEEDS: tuple[int, ...] = (0, 1, 2)
QUICK_STEPS = 100
BALANCE = 0.01


@dataclass(frozen=True)
class Task:
    """Model sizes, data and the length of a run.

    expand_v, single_expand_v: V / K of the mixture and of one memory. pairs: of a sequence at the end, for recall.
    """

    vocabulary: int
    head_dim: int
    heads: int
    expand_v: float
    single_expand_v: float
    batch: int
    steps: int
    rates: tuple[float, ...]
    width: int = 64
    length: int = 0
    pairs: int = 0


RATES = (2e-3, 5e-3, 1e-2)
# M + 1 states of V = K against one of V = 5 K; four values and eight pairs for each row of a state, so that no
# competitor answers all queries.
RECALL = Task(165, 4, 1, 1.0, 5.0, batch=32, steps=500, rates=(5e-3, 1e-2, 2e-2), pairs=32)
# One memory with V = 5/2 K has at least the active parameters of two routed ones and a shared one.
LANGUAGE = Task(VOCABULARY, 16, 2, 1.0, 2.5, batch=16, steps=400, rates=RATES, length=128)


@dataclass(frozen=True)
class Job:
    """One training: of a mixture, or of one memory."""

    task: Task
    mixture: bool
    rate: float
    seed: int
    balance: float = BALANCE


def build(job: Job) -> HybridForCausalLM:
    """A language model of two layers."""
    torch.manual_seed(job.seed)
    task = job.task
    sizes: dict[str, Any] = {
        "vocab_size": task.vocabulary,
        "hidden_size": task.width,
        "num_hidden_layers": 2,
        "num_heads": task.heads,
        "intermediate_size": 2 * task.width,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    if job.mixture:
        layer: dict[str, Any] = {"head_dim": task.head_dim, "expand_v": task.expand_v}
        layer |= {"num_memories": MEMORIES, "topk": TOPK, "aux_loss_scale": job.balance}
        model: HybridForCausalLM = MomForCausalLM(MomConfig(**sizes, **layer))
    else:
        layer = {"head_dim": task.head_dim, "expand_v": task.single_expand_v}
        model = HybridForCausalLM(HybridConfig(**sizes, mixer="gated_deltanet", mixer_options=layer))
    _start(model)
    return model


@torch.no_grad()
def _start(model: HybridForCausalLM) -> None:
    """Both models start by one rule: embeddings of std 1, linears of std D^-1/2, a decay of exp(-0.001) in all heads.

    The published starts are for width 1024 and many steps; a head may then keep a few tokens only.
    """
    for name, p in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            p.normal_()
        elif name.endswith("A_log"):
            p.zero_()
        elif name.endswith("dt_bias"):
            p.fill_(math.log(math.expm1(1e-3)))
        elif p.dim() >= 2 and not name.endswith("conv.weight"):
            p.normal_(std=p.shape[-1] ** -0.5)


def _loss(balance: float) -> Loss:
    """Next-token loss, and for a mixture the balance of its routers."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        kept: list[Any] = []

        def call(inputs: Tensor) -> Any:
            kept.append(
                model(inputs, output_router_logits=True) if isinstance(model, MomForCausalLM) else model(inputs)
            )
            return kept[-1]

        total, count = token_loss(call, batch)  # type: ignore[arg-type]
        if isinstance(model, MomForCausalLM):
            total = total + balance * kept[-1].aux_loss * count
        return total, count

    return loss


def _train(job: Job, batches: Callable[[int], Any]) -> HybridForCausalLM:
    model = build(job)
    steps = job.task.steps
    config = TrainConfig(
        steps=steps, lr=job.rate, warmup=steps // 20, betas=(0.9, 0.98), weight_decay=0.0, seed=job.seed
    )
    Trainer(model, batches, config, loss=_loss(job.balance), progress=False).run()
    return model.eval()


def recipe(task: Task) -> RecallRecipe:
    """Recall of pairs of one token each: no layer must join neighbours, which a router may send to two memories."""
    sizes = {"pairs": task.pairs, "steps": task.steps, "batch": task.batch, "vocabulary": task.vocabulary}
    return RecallRecipe(Curriculum(**sizes, task=key_value_recall, tokens=2))


def recall(job: Job) -> dict[str, Any]:
    """Train one model on recall: accuracy with all pairs, and the entropy of each router's choices over ln M."""
    model, plan = build(job), recipe(job.task)
    result = train_recall(model, plan, job.rate, job.seed, loss=_loss(job.balance))
    return {
        "accuracy": result.accuracy,
        "entropy": _entropies(model.eval(), plan.held_out()[0][0]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.no_grad()
def _entropies(model: nn.Module, inputs: Tensor) -> list[float]:
    """Of the memories chosen, by layer, over ln M."""
    if not isinstance(model, MomForCausalLM):
        return []
    found = []
    for logits in model(inputs, output_router_logits=True).router_logits:
        counts = torch.bincount(mom_route(logits, TOPK)[1].flatten(), minlength=MEMORIES).double()
        share = counts / counts.sum()
        found.append(float(torch.special.entr(share).sum()) / math.log(MEMORIES))
    return found


def language(job: Job) -> dict[str, Any]:
    """Train one model on bytes of documentation: mean loss of held-out windows, and by position."""
    task = job.task
    text = byte_text("documentation", "calibration")
    model = _train(job, ByteWindows(text, task.batch, task.length, seed=job.seed))
    windows = held_out_windows(byte_text("documentation", "evaluation"), length=task.length, batch=16, count=256)
    with torch.no_grad():
        losses = torch.cat(
            [nn.functional.cross_entropy(model(x).logits.transpose(1, 2), y, reduction="none") for x, y in windows]
        )
    positions = losses.mean(0)
    return {
        "loss": float(losses.mean()),
        "by position": [float(part.mean()) for part in positions.chunk(8)],
        "active parameters": active_parameters(model),
    }


def active_parameters(model: HybridForCausalLM) -> int:
    """Parameters that a token is multiplied by: of a memory's own ones, k + 1 of M + 1 parts."""
    total = 0
    for name, p in model.named_parameters():
        own = (
            isinstance(model, MomForCausalLM)
            and ".mixer." in name
            and p.dim() == 3
            and not name.endswith("conv.weight")
        )
        total += p.numel() * (TOPK + 1) // (MEMORIES + 1) if own else p.numel()
    return total


def tuned(
    work: Callable[[Job], dict[str, Any]], task: Task, seeds: Iterable[int], score: Callable[[dict[str, Any]], float]
) -> dict[bool, tuple[float, list[dict[str, Any]]]]:
    """For the mixture and for one memory: the best rate of the first seed, and what it gives for all seeds."""
    first, *others = seeds
    jobs = [Job(task, mixture, rate, first) for mixture in (True, False) for rate in task.rates]
    found = dict(zip(jobs, _each(work, jobs), strict=True))
    best = {m: max((j for j in jobs if j.mixture == m), key=lambda j: score(found[j])) for m in (True, False)}
    more = [replace(best[m], seed=seed) for m in (True, False) for seed in others]
    found |= dict(zip(more, _each(work, more), strict=True))
    return {m: (j.rate, [found[j], *(found[r] for r in more if r.mixture == m)]) for m, j in best.items()}


def _each(work: Callable[[Job], dict[str, Any]], jobs: list[Job]) -> list[dict[str, Any]]:
    """In as many processes as there are threads to use, because models this small gain nothing from two."""
    return list(in_parallel(work, jobs, min(cores(), torch.get_num_threads(), len(jobs))))


def recall_rows(experiment: Experiment) -> Iterator[Row]:
    """More pairs than a state has rows: a mixture against one memory of equal state, and against one of its own."""
    if experiment.quick:
        return
    task = RECALL
    experiment.say(f"recall of {task.pairs} pairs with K = {task.head_dim}")
    found = tuned(recall, task, SEEDS, lambda r: float(r["accuracy"]))
    (rate, mixture), (single_rate, single) = found[True], found[False]
    own = replace(task, single_expand_v=task.expand_v)
    others = [Job(own, False, single_rate, seed) for seed in SEEDS]
    others += [Job(task, True, rate, seed, balance=0.0) for seed in SEEDS]
    done = _each(recall, others)
    runs = {
        "mixture": mixture,
        "one memory, equal state": single,
        "one memory, its size": done[: len(SEEDS)],
        "mixture, no balance": done[len(SEEDS) :],
    }
    mean = {name: statistics.mean(r["accuracy"] for r in some) for name, some in runs.items()}
    entropy = {name: [r["entropy"] for r in runs[name]] for name in ("mixture", "mixture, no balance")}
    experiment.values["recall"] = {
        "pairs": task.pairs,
        "rates": {"mixture": rate, "one memory": single_rate},
        "parameters": {name: some[0]["parameters"] for name, some in runs.items()},
        "accuracy": {name: [r["accuracy"] for r in some] for name, some in runs.items()},
        "entropy": entropy,
    }
    title = f"recall of {task.pairs} pairs with K = {task.head_dim}, mean of {len(SEEDS)} seeds"
    for name, value in mean.items():
        yield Row(f"{title}: accuracy, {name}", "", value, "reported", True)
    spare = single[0]["parameters"] - mixture[0]["parameters"]
    yield at_least("parameters of one memory of equal state, more than the mixture's", spare, 0)
    gain = mean["mixture"] - mean["one memory, equal state"]
    yield at_least(f"{title}: mixture, more than one memory of equal state", gain, 0.05)
    gain = mean["mixture"] - mean["one memory, its size"]
    yield at_least(f"{title}: mixture, more than one memory of the size of one of its own", gain, 0.05)
    balanced, loose = (min(map(min, entropy[name])) for name in entropy)
    yield at_least("entropy of the chosen memories over ln M, least of layers and seeds", balanced, 0.8)
    yield Row("the same without the balance loss", "", loose, "reported", True)


def language_rows(experiment: Experiment) -> Iterator[Row]:
    """Bytes of documentation at equal active parameters."""
    task, seeds = LANGUAGE, SEEDS
    if experiment.quick:
        task, seeds = replace(task, steps=QUICK_STEPS, rates=task.rates[-1:]), SEEDS[:1]
    experiment.say("a byte model of documentation")
    found = tuned(language, task, seeds, lambda r: -float(r["loss"]))
    (rate, mixture), (single_rate, single) = found[True], found[False]
    mine, other = ([r["loss"] for r in runs] for runs in (mixture, single))
    experiment.values["language"] = {
        "rates": {"mixture": rate, "one memory": single_rate},
        "active parameters": {
            name: r[0]["active parameters"] for name, r in (("mixture", mixture), ("one memory", single))
        },
        "loss": {"mixture": mine, "one memory": other},
        "by position": {
            name: [statistics.mean(column) for column in zip(*(r["by position"] for r in runs), strict=True)]
            for name, runs in (("mixture", mixture), ("one memory", single))
        },
    }
    spare = single[0]["active parameters"] - mixture[0]["active parameters"]
    yield at_least("active parameters of the one-memory byte model, more than the mixture's", spare, 0)
    ratio = statistics.mean(mine) / statistics.mean(other)
    what = f"byte model: loss of the mixture over one memory's, mean of {len(seeds)} seeds"
    yield experiment.in_full(at_most(what, ratio, 1.01))
