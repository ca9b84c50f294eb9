# SPDX-License-Identifier: Apache-2.0
"""What a measurement of activation sparsity says, and the thresholds that go with it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.sparsify.sparsing_law.criteria import Cats, Cett, Fat
from tilewright.sparsify.sparsing_law.measurement import Measurement, Pass
from tilewright.sparsify.sparsing_law.neurons import neuron_thresholds
from tilewright.sparsify.sparsing_law.search import Found, perplexity_ratio
from tilewright.sparsify.thresholds import Thresholds, save_thresholds


@dataclass(frozen=True)
class SparsityReport:
    """Activation sparsity of a model on a text under one metric.

    metric, arg: what was dropped: "cett" with its tail error, "fat" with eps, "topk" or "cats" with the share dropped.
    activation_ratio: share of neurons active in the sparse model, mean over tokens and layers; per_layer: by block.
    ppl_dense, ppl_sparse, ppl_ratio: perplexities, and exp of the mean difference of the losses.
    stderr: standard error of ln ppl_ratio over the scored tokens, dense and sparse losses paired.
    tokens, scored: seen without padding, and scored. silent: see ``Measurement.silent``.
    p: the rise of perplexity in percent that was asked for, if one was; reached: False where even dropping everything
    stays below it. curve: (level, ppl_ratio) of the places that the search tried.
    eps: thresholds on ||n_i|| by block (CETT). thresholds: what a kernel compares, where the metric has any.
    frequency: share of tokens for which each neuron is active, float64 [m] by block. token_ratio: share of neurons
    active for each token, float64 [tokens].
    """

    metric: str
    arg: float
    activation_ratio: float
    per_layer: dict[str, float]
    ppl_dense: float
    ppl_sparse: float
    ppl_ratio: float
    stderr: float
    tokens: int
    scored: int
    silent: int
    p: float | None = None
    reached: bool = True
    curve: list[tuple[float, float]] = field(default_factory=list)
    eps: dict[str, float] = field(default_factory=dict)
    thresholds: Thresholds | None = field(default=None, repr=False)
    frequency: dict[str, Tensor] = field(default_factory=dict, repr=False)
    token_ratio: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)

    @property
    def cett(self) -> float | None:
        """The tail error, if the metric is CETT."""
        return self.arg if self.metric == "cett" else None

    @property
    def sparsity(self) -> float:
        """1 - activation_ratio."""
        return 1 - self.activation_ratio

    @property
    def resolved(self) -> bool:
        """Whether the text is long enough: p % is more than two standard errors of the loss difference."""
        return self.p is None or math.log1p(self.p / 100) > 2 * self.stderr

    def to_dict(self) -> dict[str, Any]:
        """JSON values: all but the tensors."""
        tensors = ("thresholds", "frequency", "token_ratio")
        found = {name: value for name, value in vars(self).items() if name not in tensors}
        return {**found, "cett": self.cett, "resolved": self.resolved}

    @property
    def notes(self) -> list[str]:
        """What a reader should know before relying on the figures."""
        found = []
        if not self.reached:
            found.append("perplexity stays below the target even with everything dropped; level 1 is reported")
        if not self.resolved:
            found.append(
                f"the standard error of the loss difference is {100 * self.stderr:.2f} %, too much for p = {self.p:g} %"
                "; measure on more text"
            )
        if any(ratio < 1 for _, ratio in self.curve):
            places = ", ".join(f"{level:.4g}: {ratio:.4f}" for level, ratio in sorted(self.curve))
            found.append(f"perplexity falls below the dense model's at some levels, ratios by level: {places}")
        if self.silent:
            found.append(f"{self.silent} sampled outputs are (nearly) zero and have no tail error")
        return found


def report_of(
    measured: Measurement, metric: str, arg: float, scope: str = "token", found: Found | None = None,
    p: float | None = None,
) -> SparsityReport:  # fmt: skip
    """The report of a pass."""
    result = measured.run(metric, arg, scope)
    difference = result.losses - measured.dense
    dense = float(measured.dense.mean())
    criterion = measured.criterion(metric, scope)
    eps = criterion.eps(arg) if isinstance(criterion, Cett) else {}
    return SparsityReport(
        metric,
        arg,
        result.ratio,
        result.per_layer,
        math.exp(dense),
        math.exp(float(result.losses.mean())),
        perplexity_ratio(measured, result),
        _stderr(difference),
        result.tokens,
        len(difference),
        measured.silent if metric == "cett" else 0,
        p=p,
        reached=found is None or found.reached,
        curve=[] if found is None else found.curve,
        eps=eps,
        thresholds=_thresholds(measured, metric, arg, scope, eps, result, p),
        frequency={name: count.double() / result.tokens for name, count in result.counts.items()},
        token_ratio=result.token_ratio,
    )


def _stderr(difference: Tensor) -> float:
    return float(difference.std(unbiased=True)) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf


def _thresholds(
    measured: Measurement, metric: str, arg: float, scope: str, eps: dict[str, float], result: Pass, p: float | None
) -> Thresholds | None:
    about = {"method": metric, "arg": arg, "p": p, "activation_ratio": result.ratio, "tokens": result.tokens}
    criterion = measured.criterion(metric, scope)
    if isinstance(criterion, Cett):
        norms = {name: one.norms for name, one in criterion.errors.items()}
        return hidden_thresholds(eps, norms, about)
    if isinstance(criterion, Cats):
        gates = {block.name: torch.tensor(criterion.threshold(block.name, arg)) for block in measured.blocks}
        return Thresholds(gates, "gate", about)
    if isinstance(criterion, Fat):
        return Thresholds({block.name: torch.tensor(arg) for block in measured.blocks}, "gate", about)
    return None


def hidden_thresholds(
    eps: Mapping[str, float], norms: Mapping[str, Tensor], about: dict[str, Any] | None = None
) -> Thresholds:
    """eps_l on ||n_i|| as bounds on |h_i|, one a neuron; ``about`` keeps the eps."""
    values = {name: neuron_thresholds(bound, norms[name]) for name, bound in eps.items()}
    return Thresholds(values, "hidden", {**(about or {}), "eps": dict(eps)})


def export_thresholds(report: SparsityReport, path: str | os.PathLike[str]) -> Path:
    """Write the thresholds of a report to a ``.json`` or ``.safetensors`` file, for the sparse kernels.

    CETT's are bounds on |h_i|, one a neuron (score "hidden"), and the file's ``about`` holds eps by block; those of FAT
    and CATS are one bound on |s_i| a block (score "gate"). :func:`tilewright.sparsify.thresholds.load_thresholds`
    reads them.

    Raises:
        ValueError: the metric has no thresholds (zero, topk), or the name has another ending.
    """
    if report.thresholds is None:
        raise ValueError(f"metric {report.metric!r} has no thresholds; use cett, cats or fat")
    return save_thresholds(report.thresholds, path)
