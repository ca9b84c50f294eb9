# SPDX-License-Identifier: Apache-2.0
"""Does a direction in the MLP's activations tell a concept? Scores that need no judge, and what to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tilewright.inspect.snmf.activations import TokenIndex

MEASURES = ("cosine", "correlation", "r2")
LEAST_MEAN = 1e-3


def unit(vector: Any) -> Tensor:
    """``vector`` [..., d] over its norm, float32; zeros stay zeros."""
    v = torch.as_tensor(vector).float()
    return v / v.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def token_similarity(directions: Any, X: Tensor, measure: str = "cosine") -> Tensor:
    """How alike every token's activation X [n, d] and every direction [r, d] are: [n, r].

    measure: "cosine"; "correlation" (cosine after the mean over neurons is taken from both); "r2", its square: the
        share of an activation's variance over neurons that the direction explains.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: need one of {', '.join(MEASURES)}")
    v = torch.atleast_2d(torch.as_tensor(directions)).float()
    x = X.float()
    if measure != "cosine":
        v, x = v - v.mean(1, keepdim=True), x - x.mean(1, keepdim=True)
    found = unit(x) @ unit(v).T
    return found.square() if measure == "r2" else found


def sentence_maximum(values: Any, index: TokenIndex) -> Tensor:
    """Largest value over the tokens of each text: [texts, r] from [n, r]; a text without a row gives -inf."""
    v = torch.as_tensor(values)
    out = v.new_full((len(index.texts), v.shape[1]), -math.inf)
    return out.scatter_reduce_(0, index.sentence[:, None].expand_as(v), v, "amax")


def sentence_scores(directions: Any, X: Tensor, index: TokenIndex, measure: str = "cosine") -> Tensor:
    """a(s) [texts, r]: the largest similarity over the tokens of a text."""
    return sentence_maximum(token_similarity(directions, X, measure), index)


def auroc(scores: Any, positive: Sequence[bool] | Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Area under the ROC curve of every column of scores [n, r]: the chance that a positive row is above another.

    Raises:
        ValueError: there is no positive row, or no other.
    """
    from scipy.stats import rankdata

    values = np.atleast_2d(np.asarray(scores, dtype=np.float64).T).T
    labels = np.asarray(positive, dtype=bool)
    count, others = int(labels.sum()), int((~labels).sum())
    if labels.shape != (len(values),) or not count or not others:
        raise ValueError(f"positive: {len(values)} labels of both kinds are needed, got {count} true, {others} false")
    ranks = rankdata(values, axis=0)
    return (ranks[labels].sum(0) - count * (count + 1) / 2) / (count * others)


@dataclass(frozen=True)
class ConceptScore:
    """S_CD = log(mean a(s) of the concept's texts / mean of the others), and the AUROC of a(s).

    floored: a mean was below 1e-3 and counted as that, so ``score`` says little.
    """

    score: float
    auroc: float
    positive_mean: float
    negative_mean: float
    floored: bool


def concept_detection_score(
    direction: Any,
    X: Tensor,
    index: TokenIndex,
    positive: Sequence[int],
    negative: Sequence[int],
    measure: str = "cosine",
) -> ConceptScore:
    """How well a direction [d] tells the texts ``positive`` from the texts ``negative`` (numbers into index.texts).

    Raises:
        ValueError: a list is empty, or a text has no row in X.
    """
    scores = sentence_scores(direction, X, index, measure)[:, 0]
    above, below = (scores[list(numbers)].double() for numbers in (positive, negative))
    if not len(above) or not len(below) or not bool(torch.isfinite(torch.cat([above, below])).all()):
        raise ValueError("positive and negative: texts with at least one row in X are needed in each")
    means = float(above.mean()), float(below.mean())
    labels = [True] * len(above) + [False] * len(below)
    area = float(auroc(torch.cat([above, below])[:, None], labels)[0])
    score = math.log(max(means[0], LEAST_MEAN) / max(means[1], LEAST_MEAN))
    return ConceptScore(score, area, *means, min(means) < LEAST_MEAN)


def diff_mean(X: Tensor, index: TokenIndex, positive: Sequence[int], negative: Sequence[int]) -> Tensor:
    """DiffMean: the unit difference [d] of mean activations over tokens of the two sets of texts."""
    return unit(X[index.rows_of(positive)].float().mean(0) - X[index.rows_of(negative)].float().mean(0))


def labelled_neuron(
    X: Tensor, index: TokenIndex, positive: Sequence[int], negative: Sequence[int]
) -> tuple[Tensor, int, float]:
    """The neuron whose largest value over a text, of either sign, tells the two sets best.

    Returns the unit vector [d] of that sign, the neuron, and its AUROC.
    """
    chosen = [*positive, *negative]
    labels = [True] * len(positive) + [False] * len(negative)
    areas = [auroc(sentence_maximum(sign * X.float(), index)[chosen], labels) for sign in (1, -1)]
    sign = 1 if areas[0].max() >= areas[1].max() else -1
    area = areas[0] if sign == 1 else areas[1]
    neuron = int(area.argmax())
    vector = torch.zeros(X.shape[1])
    vector[neuron] = sign
    return vector, neuron, float(area[neuron])


def random_sparse(width: int, neurons: int, seed: int = 0) -> Tensor:
    """A unit direction [width] of so many random neurons with normal weights: what a feature must beat."""
    random = torch.Generator().manual_seed(seed)
    vector = torch.zeros(width)
    vector[torch.randperm(width, generator=random)[:neurons]] = torch.randn(neurons, generator=random)
    return unit(vector)


def best_feature(
    coefficients: Any, index: TokenIndex, positive: Sequence[int], negative: Sequence[int]
) -> tuple[int, float]:
    """The feature whose largest coefficient over a text tells the two sets best, and its AUROC there."""
    scores = sentence_maximum(coefficients, index)[[*positive, *negative]]
    area = auroc(scores, [True] * len(positive) + [False] * len(negative))
    return int(area.argmax()), float(area.max())
