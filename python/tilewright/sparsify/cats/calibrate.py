# SPDX-License-Identifier: Apache-2.0
"""Thresholds from data: quantiles of a score of each layer's neurons (section 3 of the paper)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tilewright.capture import Batch, Reducer, Site, observe
from tilewright.nn.cats_mlp import activation
from tilewright.reducers import Moments
from tilewright.sparsify.mlps import GatedMLP, Names, gated_mlps
from tilewright.sparsify.quantiles import LogHistogram, Magnitudes, check_share
from tilewright.sparsify.thresholds import Score, Thresholds

Ranking = Literal["activation", "norm", "up", "output"]
"""What a layer's neurons are compared by: |a_j|; |a_j| ||W_down[:, j]||; |a_j| times the root mean square of u_j on the
calibration text; |a_j u_j| ||W_down[:, j]|| (needs u)."""
RANKINGS: tuple[Ranking, ...] = ("activation", "norm", "up", "output")
METHODS: dict[str, Callable[[], Reducer]] = {"exact": Magnitudes, "hist": LogHistogram}
FEWEST = 1000


class Scores:
    """What calibration saw of every layer: thresholds for any sparsity come from one pass over the data."""

    def __init__(self, ranking: Ranking, weights: dict[str, Tensor | None], seen: dict[str, Any]) -> None:
        self._ranking, self._weights, self._seen = ranking, weights, seen

    def thresholds(self, sparsity: float) -> Thresholds:
        """Per layer: the same share of scores dropped in each."""
        return self._thresholds({name: one.quantile(sparsity) for name, one in self._seen.items()}, sparsity, "layer")

    def global_threshold(self, sparsity: float) -> Thresholds:
        """One value for all layers (FAT), so that the share is met over all of them together."""
        parts = list(self._seen.values())
        together = parts[0]
        for part in parts[1:]:
            together = together + part
        return self._thresholds(dict.fromkeys(self._seen, together.quantile(sparsity)), sparsity, "model")

    def _thresholds(self, values: dict[str, float], sparsity: float, share: str) -> Thresholds:
        score: Score = "hidden" if self._ranking == "output" else "gate"
        made = {name: self._threshold(name, value) for name, value in values.items()}
        count = min(one.count for one in self._seen.values())
        about = {"method": "cats", "sparsity": sparsity, "ranking": self._ranking, "share": share, "values": count}
        return Thresholds(made, score, about)

    def _threshold(self, name: str, value: float) -> Tensor:
        weight = self._weights[name]
        if weight is None:
            return torch.tensor(value)
        if value == 0.0:
            return torch.zeros(())
        return (value / weight).float()


def collect_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: Literal["exact", "hist"] = "exact",
    ranking: Ranking = "activation",
    names: Names | Mapping[str, Names] | None = None,
    progress: bool | None = None,
) -> Scores:
    """Run the model over the data once and keep each layer's scores: all of them ("exact") or a histogram ("hist").

    Padding (an ``attention_mask`` of 0) does not count. "exact" holds 4 bytes a neuron and token; "hist" 2.8 MB a
    layer. Ranking "up" runs the model over the data twice, and holds the batches.

    Raises:
        ValueError: a word is unknown, batches are empty, an activation is NaN, or the model has no gated MLP (named).
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}, needed one of {', '.join(map(repr, METHODS))}")
    if ranking not in RANKINGS:
        raise ValueError(f"ranking = {ranking!r}, needed one of {', '.join(map(repr, RANKINGS))}")
    mlps = gated_mlps(model, names)
    weights: dict[str, Tensor | None] = dict.fromkeys(mlps)
    if ranking == "up":
        batches = list(batches)
        weights |= _up_sizes(model, batches, mlps, progress)
    elif ranking != "activation":
        weights |= {name: mlp.down_norms() for name, mlp in mlps.items()}
    sites: dict[str | Site, Callable[[], Reducer]] = {}
    points: dict[str, str] = {}
    for name, mlp in mlps.items():
        part, side = ("down", "input") if ranking == "output" else ("gate", "output")
        site = Site.parse(mlp.site(part, side))
        sites[Site(site.pattern, site.side, _scorer(mlp, ranking, weights[name]))] = METHODS[method]
        points[f"{name}.{getattr(mlp.names, part)}@{side}".lstrip(".")] = name
    seen = observe(model, batches, sites, progress=progress, description="calibrating thresholds")
    scores = {points[point]: value for point, value in seen.items()}
    if (fewest := min(one.count for one in scores.values())) < FEWEST:
        warnings.warn(f"only {fewest} activations a layer were seen; thresholds need {FEWEST} or more", stacklevel=2)
    return Scores(ranking, weights, scores)


def _up_sizes(
    model: nn.Module, batches: list[Batch], mlps: dict[str, GatedMLP], progress: bool | None
) -> dict[str, Tensor]:
    """Root mean square of each neuron's up activation, by MLP: float64 [M]."""
    sites: dict[str | Site, Callable[[], Reducer]] = {mlp.site("up", "output"): Moments for mlp in mlps.values()}
    seen = observe(model, batches, sites, progress=progress, description="sizes of up activations")
    found = (seen[f"{name}.{mlp.names.up}@output".lstrip(".")] for name, mlp in mlps.items())
    return {name: (one.mean.square() + one.variance).sqrt() for name, one in zip(mlps, found, strict=True)}


def _scorer(mlp: GatedMLP, ranking: Ranking, weight: Tensor | None) -> Callable[[Tensor], Tensor]:
    weights = None if weight is None else weight.float()

    def score(x: Tensor) -> Tensor:
        value = x.float() if ranking == "output" else activation(mlp.act, x.float())
        return value.abs() if weights is None else value.abs() * weights.to(x.device)

    return score


def calibrate_thresholds(
    model: nn.Module,
    batches: Iterable[Batch],
    sparsity: float = 0.5,
    method: Literal["exact", "hist"] = "exact",
    *,
    ranking: Ranking = "activation",
    names: Names | Mapping[str, Names] | None = None,
    progress: bool | None = None,
) -> Thresholds:
    """For each gated MLP the smallest threshold below which a share ``sparsity`` of its |activations| lies (eq. 3).

    Args:
        model: a torch model whose MLPs have gate, up and down projections.
        batches: as :func:`tilewright.capture.observe` takes them; padding does not count.
        sparsity: share in [0, 1) of activations to drop, the same in every layer; 0 gives thresholds of 0.
        method: "exact": the value of rank ceil(k n), so that the share on this data is between k - 1/n and k (fewer
            with ties); "hist": from a histogram of constant memory, within 0.012 % of that value.
        ranking: "activation" as in the paper; "norm" weights neurons by the norm of their column of W_down, "up" by the
            root mean square of their up activation on this data, both at the same cost when running; "output" by the
            norm and the up activation itself, which a sparse product would have to read first.
        names: what the parts of the MLPs are called, where not as in transformers' Llama.

    Raises:
        ValueError: sparsity is outside [0, 1), or as :func:`collect_scores`.
    """
    check_share(sparsity)
    scores = collect_scores(model, batches, method=method, ranking=ranking, names=names, progress=progress)
    return scores.thresholds(sparsity)


def finite(threshold: Tensor) -> Tensor:
    """Infinite thresholds as the largest float32: for checkpoints, whose tensors are finite."""
    return threshold.clamp(max=torch.finfo(torch.float32).max) if math.isinf(float(threshold.max())) else threshold
