# SPDX-License-Identifier: Apache-2.0
"""The small models of Hedgehog's claim: digits in patches (conversion), recall of pairs (from scratch)."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.claims import Experiment, Row, at_least
from tilewright.data.recall import IGNORE, Curriculum
from tilewright.linearize.hedgehog.config import HedgehogConfig
from tilewright.linearize.hedgehog.distillation import distill
from tilewright.linearize.hedgehog.module import FeatureAttention, softmax_teacher
from tilewright.train.recall import RecallRecipe, train_recall

HEADS, WIDTH = 2, 32
RECALL_SIZES = (8, 4)
"""Numbers of a key and of a value in a head of the recall models.

1 + ELU then has fewer features than there are keys, and with few values the noise of a read decides.
"""
LEARNING_RATES: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
SEEDS: tuple[int, ...] = (0, 1, 2)
TUNING_RATES = (1e-3, 3e-3, 1e-2)
TEST = 360


class Block(nn.Module):
    """Pre-norm attention and MLP; causal blocks mix each token with the one before it first (a convolution of 2).

    head: numbers of a key and of a value in a head, the width over the heads for both unless given.
    """

    def __init__(
        self, feature_map: str, causal: bool, width: int, heads: int, head: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        key, value = (width // heads, width // heads) if head is None else head
        self.sizes = (heads * key, heads * key, heads * value)
        self.projections, self.out = nn.Linear(width, sum(self.sizes)), nn.Linear(heads * value, width)
        self.shift = nn.Parameter(torch.zeros(sum(self.sizes))) if causal else None
        config = HedgehogConfig(feature_map)
        self.attention = FeatureAttention(key, heads, config=config, causal=causal)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.projections(self.norms[0](x))
        if self.shift is not None:
            qkv = qkv + self.shift * F.pad(qkv, (0, 0, 1, -1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv.split(self.sizes, -1))
        x = x + self.out(self.attention(q, k, v)[0].flatten(2))
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


class Digits(nn.Module):
    """A two-layer patch transformer: 8 x 8 pixels as 16 patches of 2 x 2, classes from the mean token."""

    def __init__(self, feature_map: str = "hedgehog", width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.patches, self.places = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(feature_map, False, width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 8, 8] in [0, 1] to logits [B, 10]."""
        cut = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
        x = self.patches(cut) + self.places
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x.mean(1)))
        return logits


class Recall(nn.Module):
    """Two causal blocks over token embeddings, without positions."""

    def __init__(self, feature_map: str, vocabulary: int, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(feature_map, True, width, heads, RECALL_SIZES) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to logits [B, T, V]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def fit(model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]], steps: int, lr: float) -> None:
    """AdamW with a short warm-up and half a cosine to zero; cross-entropy over the labels that count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        inputs, labels = batches(step)
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of the labels that count which the model ranks first."""
    counted = labels != IGNORE
    return float((model(inputs).argmax(-1) == labels)[counted].float().mean())


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits, shuffled: images [N, 8, 8] in [0, 1] and labels.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as wrong:
        raise ImportError("the digits are part of scikit-learn; install it (pip install scikit-learn)") from wrong
    found: Any = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.images, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]


def digits_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 5: a bidirectional model trained with softmax, then converted by distillation and a short tuning."""
    experiment.say("digits: softmax, then converted")
    images, labels = digits()
    train, test = (images[:-TEST], labels[:-TEST]), (images[-TEST:], labels[-TEST:])
    steps, distilled, tuned = (200, 60, 80) if experiment.quick else (600, 200, 150)
    rates = TUNING_RATES[1:2] if experiment.quick else TUNING_RATES
    found: dict[str, list[float]] = {}
    for seed in (0,) if experiment.quick else (0, 1, 2):
        torch.manual_seed(seed)
        batches = _shuffled(*train, seed)
        model = Digits()
        with softmax_teacher(model):
            fit(model, batches, steps, 1e-2)
            found.setdefault("softmax", []).append(accuracy(model, *test))
            # the same tuning again, so that the converted model has no more training than its teacher
            found.setdefault("softmax, tuned on", []).append(_tuned(model, batches, tuned, rates, test))
        distill(model, lambda step, batches=batches: batches(step), steps=distilled, progress=False)  # type: ignore[misc]
        found.setdefault("hedgehog, distilled", []).append(accuracy(model, *test))
        found.setdefault("hedgehog, tuned", []).append(_tuned(model, batches, tuned, rates, test))
        baseline = Digits("elu")
        baseline.load_state_dict({k: v for k, v in model.state_dict().items() if ".phi_" not in k})
        found.setdefault("1+ELU, tuned", []).append(_tuned(baseline, batches, tuned, rates, test))
    experiment.values["digits"] = found
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    teacher = max(mean["softmax"], mean["softmax, tuned on"])
    yield Row(
        "digits: accuracy of softmax attention, the better of before and after tuning", "", teacher, "reported", True
    )
    yield Row("digits: accuracy converted and distilled, not tuned", "", mean["hedgehog, distilled"], "reported", True)
    ratio = mean["hedgehog, tuned"] / teacher
    yield at_least("digits: converted by distillation and tuning, accuracy over softmax's", ratio, 0.99, paper="> 0.99")
    over = mean["hedgehog, tuned"] / mean["1+ELU, tuned"]
    yield at_least("digits: accuracy, Hedgehog over 1+ELU converted and tuned alike", over, 1.0)


def _tuned(
    model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]], steps: int, rates: tuple[float, ...], test: Any
) -> float:
    """Accuracy after tuning everything, at the best learning rate (chosen on the training images)."""
    found = []
    for lr in rates:
        mine = copy.deepcopy(model)
        fit(mine, batches, steps, lr)
        with torch.no_grad():
            images, labels = batches(-1)
            loss = float(F.cross_entropy(mine(images), labels))
        found.append((loss, accuracy(mine, *test)))
    return min(found)[1]


def _shuffled(images: Tensor, labels: Tensor, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The batch of a step: 128 training images drawn anew; all of them at step -1."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        if step < 0:
            return images, labels
        generator = torch.Generator().manual_seed(1000 * seed + step)
        some = torch.randint(len(images), (128,), generator=generator)
        return images[some], labels[some]

    return batch


def recall_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 6: multi-query recall from scratch, each map at its best of three learning rates."""
    experiment.say("recall from scratch")
    data, rates, seeds = Curriculum(pairs=24, steps=600, batch=32), LEARNING_RATES, SEEDS
    if experiment.quick:
        data, rates, seeds = Curriculum(pairs=4, steps=150, batch=32, vocabulary=16), LEARNING_RATES[1:2], SEEDS[:1]
    recipe = RecallRecipe(data)
    best: dict[str, float] = {}
    found: dict[str, Any] = {}
    for name in ("softmax", "hedgehog", "elu"):
        tried = {lr: _recalled(name, lr, seeds[0], recipe) for lr in rates}
        chosen = max(tried, key=lambda lr: tried[lr])
        scores = [tried[chosen], *(_recalled(name, chosen, seed, recipe) for seed in seeds[1:])]
        found[name] = {"by lr": {str(lr): value for lr, value in tried.items()}, "at the best": scores}
        best[name] = sum(scores) / len(scores)
    experiment.values["recall"] = {"pairs": data.pairs, "steps": data.steps, **found}
    title = f"recall of {data.pairs} pairs"
    yield Row(f"{title}: accuracy of softmax attention (ceiling)", "", best["softmax"], "reported", True)
    if experiment.quick:
        # Four pairs are easy for every map; guessing one of the 8 values gives 0.125.
        yield at_least(f"{title}: accuracy of Hedgehog after a short training", best["hedgehog"], 0.5)
        return
    yield Row(f"{title}: accuracy of Hedgehog, mean of {len(seeds)} seeds", "", best["hedgehog"], "reported", True)
    gain = best["hedgehog"] - best["elu"]
    yield at_least(f"{title}: accuracy of Hedgehog minus 1+ELU at equal width", gain, 0.1)


def _recalled(name: str, lr: float, seed: int, recipe: RecallRecipe) -> float:
    """Accuracy of two layers after training: softmax ones, or with the map of that name."""
    torch.manual_seed(seed)
    model = Recall("elu" if name == "softmax" else name, recipe.data.vocabulary)
    with softmax_teacher(model) if name == "softmax" else contextlib.nullcontext():
        return train_recall(model, recipe, lr, seed).accuracy
