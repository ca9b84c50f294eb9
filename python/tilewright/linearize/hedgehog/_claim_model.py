# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 in Hedgehog's claim: queries and keys of three layers for every map, then whole models converted."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tilewright import data, evaluate, models
from tilewright.claims import Experiment, Row, at_least, at_most, falling
from tilewright.data.bytes import ByteWindows
from tilewright.linearize.hedgehog.diagnostics import attention_entropy, monotonicity
from tilewright.linearize.hedgehog.distillation import distill
from tilewright.linearize.hedgehog.losses import attention_distill_loss
from tilewright.linearize.hedgehog.method import convert_to_hedgehog, finetune_lora
from tilewright.linearize.hedgehog.module import (
    FeatureAttention,
    feature_attentions,
    softmax_attention,
    softmax_teacher,
)
from tilewright.nn.hedgehog import ELUFeatureMap, HedgehogFeatureMap, PerformerFeatureMap, ReLUFeatureMap

SEEDS = (0, 1)
LEARNED = ("softmax_dim", "exp_dim")
Pair = tuple[nn.Module, nn.Module]
QueriesKeys = tuple[Tensor, Tensor]


class Bench:
    """The model in float32, text to train on and held-out text, and how much of everything.

    layers: early, middle, late. length: tokens of a window. map_steps: of the maps of one layer. distill_steps,
    window_steps, tune_steps: of the whole model.
    """

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.layers = (2,) if quick else (2, 14, 26)
        self.length = 128 if quick else 192
        self.map_steps, windows, held_out = (200, 16, 2) if quick else (400, 48, 4)
        self.distill_steps, self.window_steps, self.tune_steps = (0, 0, 0) if quick else (100, 40, 200)
        language = models.load(data.smollm2_gguf())
        self.model = models.to_transformers(language, dequantize=True)
        tokenizer = language.tokenizer
        self.text = evaluate.text_corpus(tokenizer, "speeches", "calibration")
        count = 768 if quick else 1536
        self.evaluation = evaluate.text_corpus(tokenizer, "speeches", "evaluation", max_tokens=count)
        self.train_windows = evaluate.token_batches(self.text, length=self.length, count=windows)
        self.held_out = evaluate.token_batches(self.evaluation, length=self.length, count=held_out)

    def batches(self, seed: int = 0, batch: int = 1, length: int | None = None) -> ByteWindows:
        """Random training windows by step."""
        return ByteWindows(self.text, batch, length or self.length, seed)

    def queries_keys(self) -> dict[int, tuple[list[QueriesKeys], list[QueriesKeys]]]:
        """Rotated queries and keys of the chosen layers, of the training windows and of the held-out ones."""
        model = convert_to_hedgehog(self.model, layers=self.layers)
        del model.model.layers[max(self.layers) + 1 :]
        places = {id(f): i for i, f in zip(self.layers, feature_attentions(model).values(), strict=True)}

        def seen(windows: list[Tensor]) -> dict[int, list[QueriesKeys]]:
            kept: dict[int, list[QueriesKeys]] = {layer: [] for layer in self.layers}

            def keep(attention: FeatureAttention, q: Tensor, k: Tensor, _v: Tensor, _mask: Tensor | None) -> None:
                kept[places[id(attention)]].append((q, k))

            with softmax_teacher(model, keep), torch.no_grad():
                for window in windows:
                    model.base_model(window, use_cache=False)
            return kept

        train, held_out = seen(self.train_windows), seen(self.held_out)
        return {layer: (train[layer], held_out[layer]) for layer in self.layers}

    def perplexity(self, model: nn.Module) -> float:
        """On the held-out text, in windows of the training's length."""
        return evaluate.perplexity(model, self.evaluation, window=self.length).perplexity


def learn(pair: Pair, windows: list[QueriesKeys], steps: int, seed: int, lr: float = 1e-2) -> Pair:
    """Distil one layer's maps on its queries and keys, one window a step in random order; returns them."""
    parameters = [p for phi in pair for p in phi.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        q, k = windows[int(torch.randint(len(windows), (), generator=generator))]
        optimizer.zero_grad(set_to_none=True)
        attention_distill_loss(q, k, *pair, block_size=256).backward()
        optimizer.step()
    return pair


@torch.no_grad()
def score(pair: Pair, windows: list[QueriesKeys]) -> dict[str, float]:
    """What every map is judged by, from the matrices themselves: KL from the teacher, entropy, Spearman."""
    sums = {"kl": 0.0, "entropy": 0.0, "spearman": 0.0, "teacher": 0.0}
    for q, k in windows:
        heads = q.shape[2]
        repeated = k.repeat_interleave(heads // k.shape[2], 2)
        logits = torch.einsum("bihd,bjhd->bhij", q, repeated).double() * q.shape[-1] ** -0.5
        seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        p = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        fq, fk = pair[0](q.double()), pair[1](k.double()).repeat_interleave(heads // k.shape[2], 2)
        s = torch.einsum("bihf,bjhf->bhij", fq, fk).masked_fill(~seen, 0.0)
        a = s / (s.sum(-1, keepdim=True) + 1e-12)
        kl = (torch.special.xlogy(p, p) - p * a.clamp_min(1e-12).log()).sum(-1)[..., 1:]
        sums["kl"] += float(kl.mean()) / len(windows)
        sums["entropy"] += float(attention_entropy(a).mean()) / len(windows)
        sums["teacher"] += float(attention_entropy(p).mean()) / len(windows)
        sums["spearman"] += float(monotonicity(logits, a).mean()) / len(windows)
    return sums


def fixed_maps(seed: int) -> dict[str, Pair]:
    """The maps to compare with; Performer with as many features as Hedgehog, drawn anew for each seed."""
    performer = (
        PerformerFeatureMap(64, 128, role="query", seed=seed),
        PerformerFeatureMap(64, 128, role="key", seed=seed),
    )
    return {
        "1+ELU": (ELUFeatureMap(64), ELUFeatureMap(64)),
        "ReLU": (ReLUFeatureMap(64), ReLUFeatureMap(64)),
        "Performer": performer,
    }


def hedgehog_maps(activation: Any, init: Any = "identity") -> Pair:
    """Maps of 9 query heads and 3 key heads of 64."""
    return (
        HedgehogFeatureMap(64, num_heads=9, activation=activation, init=init),
        HedgehogFeatureMap(64, num_heads=3, activation=activation, init=init),
    )


def layer_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 3, and the half of item 2 that needs real queries and keys."""
    experiment.say(f"queries and keys of layers {bench.layers}")
    seen = bench.queries_keys()
    yield from temperature_rows(experiment, {layer: held_out for layer, (_, held_out) in seen.items()})
    found: dict[str, Any] = {}
    for layer, (train, held_out) in seen.items():
        experiment.say(f"distilling the maps of layer {layer}")
        scores: dict[str, Any] = {"identity": score(hedgehog_maps("softmax_dim"), held_out)}
        scores |= {name: score(pair, held_out) for name, pair in fixed_maps(0).items() if name != "Performer"}
        seeds = SEEDS[:1] if bench.quick else SEEDS
        scores["Performer"] = [score(fixed_maps(seed)["Performer"], held_out) for seed in seeds]
        for activation in LEARNED[:1] if bench.quick else LEARNED:
            some = seeds if activation == LEARNED[0] else seeds[:1]
            pairs = [learn(hedgehog_maps(activation), train, bench.map_steps, seed) for seed in some]
            scores[activation] = [score(pair, held_out) for pair in pairs]
        found[str(layer)] = scores
        yield from _judged(experiment, layer, scores)
    experiment.values["layers"] = found


def _judged(experiment: Experiment, layer: int, scores: dict[str, Any]) -> Iterator[Row]:
    mine = scores["softmax_dim"]
    fixed = [scores["1+ELU"], scores["ReLU"], *scores["Performer"]]
    kl = max(s["kl"] for s in mine)
    best = min(s["kl"] for s in fixed)
    name = f"layer {layer}, held out"
    yield at_most(f"{name}: KL from softmax, distilled over the best fixed map", kl / best, 0.4)
    yield Row(
        f"{name}: KL distilled, nats",
        "",
        kl,
        f"< {scores['identity']['kl']:.4g} (identity)",
        kl < scores["identity"]["kl"],
    )
    if "exp_dim" in scores:
        other = max(s["kl"] for s in scores["exp_dim"])
        yield Row(f"{name}: KL of exp_dim distilled, nats", "", other, f"< {best:.4g} (best fixed)", other < best)
    teacher = mine[0]["teacher"]
    gap = max(abs(s["entropy"] - teacher) for s in mine) / abs(scores["1+ELU"]["entropy"] - teacher)
    yield at_least(f"{name}: share of 1+ELU's entropy gap closed", 1 - gap, 0.7)
    spearman = min(s["spearman"] for s in mine)
    yield experiment.in_full(at_least(f"{name}: Spearman correlation, distilled", spearman, 0.8))
    highest = max(s["spearman"] for s in fixed)
    yield Row(
        f"{name}: Spearman, distilled over fixed maps",
        "",
        spearman,
        f"> {highest:.4g} (best fixed)",
        spearman > highest,
    )


@torch.no_grad()
def temperature_rows(experiment: Experiment, windows: dict[int, list[QueriesKeys]]) -> Iterator[Row]:
    """W = t I with exp features, mean over the layers' first held-out window."""
    entropies, correlations = [], []
    for t in (1.0, 2.0, 4.0):
        scores = [score(hedgehog_maps("exp", t), some[:1]) for some in windows.values()]
        entropies.append(sum(s["entropy"] for s in scores) / len(scores))
        correlations.append(sum(s["spearman"] for s in scores) / len(scores))
    experiment.values["temperature"] = {"entropy": entropies, "spearman": correlations}
    yield falling("exp features, W = t I: entropy at t = 1, 2, 4", entropies, paper="spikier with t")
    rises = falling("", [-c for c in correlations]).holds
    shown = " < ".join(f"{c:.4g}" for c in correlations)
    title = "exp features, W = t I: Spearman at t = 1, 2, 4"
    yield experiment.in_full(Row(title, "more monotone with t", shown, "strictly rising", rises))


def conversion_rows(experiment: Experiment, bench: Bench) -> Iterator[Row]:
    """Item 4: three layers, then all, by perplexity; then LoRA, and the window."""
    found: dict[str, Any] = {"base": bench.perplexity(bench.model)}
    experiment.values["perplexity"] = found
    if bench.quick:
        experiment.say("converting one layer")
        yield from _short_conversion(bench, found)
        return
    experiment.say("distilling all layers")
    model = convert_to_hedgehog(bench.model)
    found["all, identity"] = bench.perplexity(model)
    report = distill(model, bench.batches(), steps=bench.distill_steps, progress=False)
    experiment.values["distillation"] = report["losses"]
    found["all, distilled"] = bench.perplexity(model)
    for kind, source in (("identity", None), ("distilled", model)):
        some = convert_to_hedgehog(bench.model, layers=bench.layers)
        found[f"{len(bench.layers)} layers, {kind}"] = bench.perplexity(_with_maps(some, source))
        del some
    experiment.say("adding a window of 64")
    windowed = _with_maps(convert_to_hedgehog(bench.model, window_size=64), model)
    distill(windowed, bench.batches(1), steps=bench.window_steps, lr=3e-3, progress=False)
    found["all, distilled, window 64"] = bench.perplexity(windowed)
    del windowed
    experiment.say("LoRA")
    tuned = finetune_lora(
        model, bench.batches(2, length=128), steps=bench.tune_steps, lr=1e-3, warmup=10, progress=False
    )
    experiment.values["tuning"] = tuned["losses"]
    found["all, distilled, LoRA"] = bench.perplexity(model)
    yield from _converted(found, len(bench.layers))


def _with_maps(model: Any, source: Any) -> Any:
    """The same maps in a model as in another (the other's layers of the same name); None: as they are."""
    if source is not None:
        theirs = feature_attentions(source)
        for name, attention in feature_attentions(model).items():
            attention.load_state_dict(theirs[name].state_dict(), strict=False)
    return model


def _short_conversion(bench: Bench, found: dict[str, Any]) -> Iterator[Row]:
    model = convert_to_hedgehog(bench.model, layers=bench.layers)
    found["1 layer, identity"] = bench.perplexity(model)
    distill(model, bench.train_windows, steps=12, progress=False)
    found["1 layer, distilled"] = bench.perplexity(model)
    yield falling(
        "perplexity with one layer converted: identity, distilled",
        [found["1 layer, identity"], found["1 layer, distilled"]],
    )


def _converted(found: dict[str, Any], count: int) -> Iterator[Row]:
    few = [found[f"{count} layers, {kind}"] for kind in ("identity", "distilled")]
    yield falling(f"perplexity with {count} layers converted: identity, distilled", few)
    identity, distilled, base = found["all, identity"], found["all, distilled"], found["base"]
    yield Row("perplexity, all layers softmax", "", base, "reported", True)
    yield at_least("perplexity, all layers converted: identity over distilled", identity / distilled, 3.0)
    gap = math.log(distilled / base)
    closed = 1 - math.log(found["all, distilled, LoRA"] / base) / gap
    yield at_least("share of the log-perplexity gap that LoRA closes", closed, 0.3)
    yield Row("perplexity, all layers, distilled and LoRA", "", found["all, distilled, LoRA"], "reported", True)
    yield falling(
        "perplexity, all layers distilled: without, with a window of 64",
        [distilled, found["all, distilled, window 64"]],
    )


@torch.no_grad()
def decode_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 7: a token of one layer of SmolLM2's sizes behind a short and a long past, turn by turn."""
    experiment.say("decoding")
    layer, short, long = FeatureAttention(64, 9, 3), 256, 8192
    past = {n: [torch.randn(1, n, heads, 64) for heads in (9, 3, 3)] for n in (1, short, long)}
    states = {n: layer(*past[n], output_final_state=True)[1] for n in (short, long)}
    times: dict[tuple[str, int], float] = {}
    for _ in range(100):
        for n in (short, long):
            start = time.perf_counter()
            layer(*past[1], state=states[n], output_final_state=True)
            middle = time.perf_counter()
            softmax_attention(past[1][0], *past[n][1:], causal=False, scale=0.125)
            end = time.perf_counter()
            for name, taken in (("hedgehog", middle - start), ("softmax", end - middle)):
                times[name, n] = min(times.get((name, n), taken), taken)
    held = {n: states[n].numel() * states[n].element_size() // 9 for n in states}
    stated = (2 * 64 * 64 + 2 * 64) * 4
    experiment.values["decode"] = {f"{name} {n}": taken for (name, n), taken in times.items()}
    here = held[short] == held[long] == stated
    yield Row("bytes of state of a head", "(2 f d_v + 2 f) 4", float(held[long]), f"= {stated}, at any length", here)
    ratio = times["hedgehog", long] / times["hedgehog", short]
    title = f"fastest decode of a token behind {long} tokens over behind {short}"
    yield experiment.in_full(at_most(title, ratio, 1.15, paper="1"))
    growth = times["softmax", long] / times["softmax", short]
    yield Row("the same of softmax attention with its cache", "", growth, "reported", True)
