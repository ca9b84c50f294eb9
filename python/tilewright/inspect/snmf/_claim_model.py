# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 for SNMF's claim: detection of ten concepts, steering at equal KL, a tree over weekdays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tilewright import data, models
from tilewright.claims import Experiment, Row, at_least, at_most, spread
from tilewright.data.concepts import NEUTRAL_PROMPTS, WEEKDAYS, Concept, concepts, weekday_sentences
from tilewright.inspect.snmf import detection
from tilewright.inspect.snmf.activations import TokenIndex, collect_layers
from tilewright.inspect.snmf.hierarchy import edges_between
from tilewright.inspect.snmf.interpret import top_tokens
from tilewright.inspect.snmf.method import SemiNMF
from tilewright.inspect.snmf.steering import NextToken, find_alphas_for_kl

LAYER, K, SPARSITY, SWEEPS, TRAIN = 15, 60, 0.01, 400, 13
TREE_LAYER, TREE_RANKS, TREE_EDGE, TREE_STARTS = 12, (40, 15), 0.5, 3
STEER_LAYERS = (5, 10, 15, 20)
TARGETS = (0.1, 0.25, 0.5)
METHODS = ("SNMF", "random", "neuron", "DiffMean")


class Study:
    """The model in float32, the ten concepts, and the MLP activations of all sentences at some layers."""

    def __init__(self, quick: bool) -> None:
        model = models.load(data.smollm2_gguf())
        self.tokenizer: Any = model.tokenizer
        self.module: Any = models.to_transformers(model, dequantize=True)
        self.concepts: list[Concept] = concepts()
        self.quick = quick
        self.layers = (LAYER,) if quick else STEER_LAYERS
        self.texts = [text for one in self.concepts for text in one.sentences]
        self.x, self.index = collect_layers(self.module, self.tokenizer, self.texts, self.layers)
        self._directions: dict[tuple[int, int], tuple[dict[str, Tensor], SemiNMF, list[list[int]]]] = {}

    def split(self, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """Numbers of training and of held-out sentences of every concept."""
        random = np.random.default_rng(seed)
        train, held = [], []
        start = 0
        for one in self.concepts:
            order = (start + random.permutation(len(one.sentences))).tolist()
            train.append(order[:TRAIN])
            held.append(order[TRAIN:])
            start += len(one.sentences)
        return train, held

    def fit(self, layer: int, seed: int) -> tuple[SemiNMF, list[list[int]], list[list[int]]]:
        """SNMF of the training tokens."""
        train, held = self.split(seed)
        rows = self.index.rows_of([s for some in train for s in some])
        model = SemiNMF(K, sparsity=SPARSITY, max_iter=SWEEPS, random_state=seed).fit(self.x[layer][rows])
        return model, train, held

    def directions(self, layer: int, seed: int) -> tuple[dict[str, Tensor], SemiNMF, list[list[int]]]:
        """One direction [d] a concept of each method, chosen on training sentences alone: [concepts, d]."""
        if (layer, seed) not in self._directions:
            self._directions[layer, seed] = self._choose(layer, seed)
        return self._directions[layer, seed]

    def _choose(self, layer: int, seed: int) -> tuple[dict[str, Tensor], SemiNMF, list[list[int]]]:
        model, train, held = self.fit(layer, seed)
        x = self.x[layer]
        coefficients = model.transform(x)
        features = torch.from_numpy(model.components_)
        kept = int((features[0] != 0).sum())
        found: dict[str, list[Tensor]] = {name: [] for name in METHODS}
        for number, positive in enumerate(train):
            negative = others(train, number)
            best, _ = detection.best_feature(coefficients, self.index, positive, negative)
            found["SNMF"].append(detection.unit(features[best]))
            found["random"].append(detection.random_sparse(x.shape[1], kept, 1000 * seed + 10 * layer + number))
            found["neuron"].append(detection.labelled_neuron(x, self.index, positive, negative)[0])
            found["DiffMean"].append(detection.diff_mean(x, self.index, positive, negative))
        return {name: torch.stack(some) for name, some in found.items()}, model, held


def others(sets: Sequence[Sequence[int]], number: int) -> list[int]:
    """All sentences of the other concepts."""
    return [s for place, some in enumerate(sets) for s in some if place != number]


def detection_rows(experiment: Experiment, study: Study) -> Iterator[Row]:
    """Item 4: held-out detection of the concepts."""
    experiment.say("detection")
    seeds = (0,) if experiment.quick else (0, 1, 2)
    areas: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    positive, errors = [], []
    for seed in seeds:
        directions, model, held = study.directions(LAYER, seed)
        errors.append(model.relative_error_)
        for name in METHODS:
            scores = [
                detection.concept_detection_score(v, study.x[LAYER], study.index, held[number], others(held, number))
                for number, v in enumerate(directions[name])
            ]
            areas[name].append([one.auroc for one in scores])
            if name == "SNMF":
                positive.append(sum(one.score > 0 for one in scores))
    experiment.values["detection"] = {
        "concepts": [one.name for one in study.concepts],
        "auroc": areas,
        "relative error": errors,
        "S_CD above 0": positive,
    }
    mean = {name: float(np.mean(some)) for name, some in areas.items()}
    least = min(float(np.mean(some)) for some in areas["SNMF"])
    gap = min(float(np.mean(s) - np.mean(r)) for s, r in zip(areas["SNMF"], areas["random"], strict=True))
    name = f"layer {LAYER}, {K} features, held out"
    yield Row(f"{name}: relative error of the factorisation", "", float(np.mean(errors)), "reported", True)
    yield at_least(f"{name}: AUROC of a(s), mean of ten concepts, least of {len(seeds)} seeds", least, 0.75)
    yield at_least(f"{name}: that AUROC above a random sparse direction's", gap, 0.2)
    yield at_least(f"{name}: concepts with S_CD > 0, of 10", min(positive), 8)
    yield Row(f"{name}: AUROC of one neuron chosen with labels", "", mean["neuron"], "reported", True)
    yield Row(f"{name}: AUROC of DiffMean", "", mean["DiffMean"], "reported", True)


def concept_tokens(study: Study) -> list[list[int]]:
    """First tokens of every concept's words after a space, without those that two concepts share."""
    sets = [
        {study.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in one.words}
        for one in study.concepts
    ]
    return [sorted(own.difference(*(s for s in sets if s is not own))) for own in sets]


def steering_gains(experiment: Experiment, study: Study) -> dict[str, Any]:
    """Gain in log-probability of a concept's words, float [layers, concepts, KL targets] of every method.

    Every layer has a seed of its own, for its split of the sentences, its factorisation and its random directions.
    """
    experiment.say(f"steering, layers {', '.join(map(str, study.layers))}")
    layers = spread(layer_gains, list(enumerate(study.layers)), partial(Study, study.quick), own=study)
    gains = {name: [one["gains"][name] for one in layers] for name in layers[0]["gains"]}
    return {"layers": list(study.layers), "targets": layers[0]["targets"], "prompts": layers[0]["prompts"],
            "missed": sum(one["missed"] for one in layers), "gains": gains}  # fmt: skip


def layer_gains(which: tuple[int, int], study: Study) -> dict[str, Any]:
    """Gains of every method at one layer, float [concepts, KL targets]; which: a seed and the layer."""
    seed, layer = which
    targets = (0.25,) if study.quick else TARGETS
    prompts = NEUTRAL_PROMPTS[:4] if study.quick else NEUTRAL_PROMPTS[:10]
    methods = ("SNMF", "random", "DiffMean") if study.quick else METHODS
    sets = concept_tokens(study)
    probe = NextToken(study.module, study.tokenizer, layer, prompts)
    directions = study.directions(layer, seed)[0]
    vectors = torch.cat([directions[name] for name in methods])
    gains = {name: np.zeros((len(sets), len(targets))) for name in methods}
    start, missed = None, 0
    for t, target in enumerate(targets):
        found = find_alphas_for_kl(probe, vectors, target, start=start)
        start = torch.tensor([one.alpha for one in found])
        missed += sum(not one.reached for one in found)
        moved = probe.measure(vectors, start, sets)[1].mean(1).view(len(methods), len(sets), len(sets))
        for m, name in enumerate(methods):
            gains[name][:, t] = moved[m].diagonal().numpy()
    return {"targets": list(targets), "prompts": len(prompts), "missed": missed,
            "gains": {name: g.tolist() for name, g in gains.items()}}  # fmt: skip


def bootstrap_p(differences: np.ndarray[Any, Any], draws: int = 10000) -> float:
    """Share of resampled means that are not above 0: the one-sided p of a paired bootstrap."""
    random = np.random.default_rng(0)
    picked = differences[random.integers(len(differences), size=(draws, len(differences)))]
    return float((picked.mean(1) <= 0).mean())


def steering_rows(experiment: Experiment, study: Study) -> Iterator[Row]:
    """Item 5: equal KL, best of the targets, mean over layers and concepts."""
    found = steering_gains(experiment, study)
    experiment.values["steering"] = found
    best = {name: np.array(g).max(-1) for name, g in found["gains"].items()}
    mean = {name: float(g.mean()) for name, g in best.items()}
    apart = (best["SNMF"] - best["random"]).reshape(-1)
    name = f"gain of the concept's words, nat, best of KL {', '.join(map(str, found['targets']))}"
    yield Row(f"{name}: SNMF", "", mean["SNMF"], "reported", True)
    yield experiment.in_full(at_least(f"{name}: SNMF above a random sparse direction", float(apart.mean()), 0.15))
    yield experiment.in_full(at_most("paired bootstrap over layers and concepts, p", bootstrap_p(apart), 0.05))
    order = sorted(mean, key=lambda n: -mean[n])
    text = ", ".join(f"{n} {mean[n]:+.2f}" for n in order)
    yield Row(f"{name}: order", "SNMF first (causal steering)", text, "reported", True)
    yield Row("strengths that missed their KL by more than 5 %", "", found["missed"], "reported", True)


def weekday_rows(experiment: Experiment, study: Study) -> Iterator[Row]:
    """Item 6: a level-2 feature gathers the level-1 features of weekdays, of the weekday sentences' tokens."""
    experiment.say("hierarchy")
    found, index = collect_layers(study.module, study.tokenizer, weekday_sentences(), [TREE_LAYER])
    days = {study.tokenizer(f" {day}", add_special_tokens=False)["input_ids"][0] for day in WEEKDAYS}
    results = [weekday_tree(found[TREE_LAYER], index, days, seed) for seed in ((0,) if experiment.quick else (0, 1, 2))]
    experiment.values["weekdays"] = results
    low, high = TREE_RANKS
    name = f"weekdays, layer {TREE_LAYER}, ranks {low} and {high}, least of {len(results)} seeds"
    least = min(one["weekday features"] for one in results)
    yield Row(f"{name}: level-1 features of weekdays", "", least, "reported", True)
    for scale, need in (("unit", True), ("raw", False)):
        children = min(one[scale]["children"] for one in results)
        precision = min(one[scale]["precision"] for one in results)
        what = f"{name}, level-1 features {'of length 1' if need else 'as they are'}"
        if need:
            yield experiment.in_full(at_least(f"{what}: of them under one level-2 feature", children, 4))
            yield experiment.in_full(at_least(f"{what}: precision of its children", precision, 0.7))
        else:
            yield Row(f"{what}: of them under one level-2 feature", "", children, "reported", True)
            yield Row(f"{what}: precision of its children", "", precision, "reported", True)


def weekday_tree(x: Tensor, index: TokenIndex, days: set[int], seed: int) -> dict[str, Any]:
    """Which level-1 features are of weekdays (half of their ten top tokens are), and their best level-2 parents."""
    first = best_start(x, TREE_RANKS[0], seed)
    coefficients = first.transform(x)
    is_day = []
    for feature in range(coefficients.shape[1]):
        top = top_tokens(coefficients, index, feature, count=10)
        is_day.append(bool(top) and sum(one.token in days for one in top) >= len(top) / 2)
    features = torch.from_numpy(first.components_)
    found: dict[str, Any] = {"weekday features": sum(is_day)}
    for scale, rows in (("raw", features), ("unit", detection.unit(features))):
        second = best_start(rows, TREE_RANKS[1], seed)
        found[scale] = best_parent(second.transform(rows).T.numpy(), is_day)
    return found


def best_start(x: Tensor, rank: int, seed: int) -> SemiNMF:
    """Of some random starts the one of least error: no label is looked at."""
    starts = range(TREE_STARTS * seed, TREE_STARTS * (seed + 1))
    made = [SemiNMF(rank, sparsity=SPARSITY, max_iter=SWEEPS, random_state=start).fit(x) for start in starts]
    return min(made, key=lambda one: one.reconstruction_err_)


def best_parent(weights: Any, is_day: list[bool]) -> dict[str, Any]:
    """The level-2 feature with most weekday children by weights [k_2, k_1], and what share of its children they are."""
    children: dict[int, list[int]] = {}
    for edge in edges_between(weights, 2, TREE_EDGE):
        children.setdefault(edge.parent, []).append(edge.child)
    scored = [
        {
            "parent": parent,
            "children": sum(is_day[c] for c in some),
            "precision": sum(is_day[c] for c in some) / len(some),
        }
        for parent, some in children.items()
    ]
    return max(scored, key=lambda one: (one["children"], one["precision"]))
