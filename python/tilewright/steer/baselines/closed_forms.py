# SPDX-License-Identifier: Apache-2.0
"""Maps from pooled source activations Z [n, C] to target activations V [m, C], coordinate by coordinate.

DiffMean (arXiv 2308.10248, 2312.06681), ITI (2306.03341), AurA (2407.12824), and Linear-AcT with its simpler forms
(2410.23054). Each is fitted at one place at a time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tilewright.capture import ActivationMap
from tilewright.reference.sorted_w2 import quantile_coupling
from tilewright.steer.problem import FitMap, Problem
from tilewright.steer.steering import Steering

# A standard deviation below this is taken for it (apple/ml-act's floor).
_LEAST_STD = 1e-4


@dataclass(frozen=True)
class AtOnceConfig:
    """sequential: fit each map to activations that the maps before it have changed already."""

    sequential: bool = False


@dataclass(frozen=True)
class SequentialConfig:
    """sequential: fit each map to activations that the maps before it have changed already."""

    sequential: bool = True


@dataclass(frozen=True)
class LinActConfig(SequentialConfig):
    """support: "range" applies a map only where a coordinate lies in the range of the source samples."""

    support: Literal["all", "range"] = "all"

    def __post_init__(self) -> None:
        if self.support not in ("all", "range"):
            raise ValueError(f"lin_act: support = {self.support!r}, needed 'all' or 'range'")


def diffmean(problem: Problem, config: AtOnceConfig, *, progress: bool | None = None) -> Steering:
    """w = 1, b = mean(V) - mean(Z)."""
    del progress
    return _solve("diffmean", problem, config, mean_shift)


def mean_act(problem: Problem, config: SequentialConfig, *, progress: bool | None = None) -> Steering:
    """w = 1, b = mean(V) - mean(Z)."""
    del progress
    return _solve("mean_act", problem, config, mean_shift)


def gaussian_act(problem: Problem, config: SequentialConfig, *, progress: bool | None = None) -> Steering:
    """w = sd(V) / sd(Z), b = mean(V) - w mean(Z)."""
    del progress
    return _solve("gaussian_act", problem, config, match_moments)


def lin_act(problem: Problem, config: LinActConfig, *, progress: bool | None = None) -> Steering:
    """Least squares from sorted Z to sorted V."""
    del progress

    def fit(z: Tensor, v: Tensor) -> ActivationMap:
        one = sorted_least_squares(z, v)
        if config.support == "range":
            one = dataclasses.replace(one, low=z.amin(0).cpu(), high=z.amax(0).cpu())
        return one

    return _solve("lin_act", problem, config, fit)


def iti_c(problem: Problem, config: AtOnceConfig, *, progress: bool | None = None) -> Steering:
    """w = 1, b = the classifier's unit normal times the standard deviation of all projections on it."""
    del progress
    return _solve("iti_c", problem, config, classifier_direction)


def aura(problem: Problem, config: AtOnceConfig, *, progress: bool | None = None) -> Steering:
    """b = 0, w = 1 - Gini = 2 (1 - AUROC) where AUROC > 0.5, else 1; the source is the positive class."""
    del progress
    return _solve("aura", problem, config, dampen_experts)


def _solve(name: str, problem: Problem, config: Any, fit: FitMap) -> Steering:
    maps = problem.closed_form(fit, sequential=config.sequential)
    return Steering(maps, name, {**dataclasses.asdict(config), "pooling": problem.pooling})


def mean_shift(z: Tensor, v: Tensor) -> ActivationMap:
    """w = 1, b = mean(V) - mean(Z)."""
    return _map(torch.ones_like(z[0]), v.mean(0) - z.mean(0))


def match_moments(z: Tensor, v: Tensor) -> ActivationMap:
    """w = sd(V) / sd(Z), with standard deviations of at least 1e-4."""
    sd = [x.std(0, unbiased=False).clamp_min(_LEAST_STD) for x in (z, v)]
    w = sd[1] / sd[0]
    return _map(w, v.mean(0) - w * z.mean(0))


def sorted_least_squares(z: Tensor, v: Tensor) -> ActivationMap:
    """w = cov(x, y) / var(x), b = mean(y) - w mean(x), x and y coupled by quantiles; w = 1 where Z does not vary."""
    x, y = z.double().sort(0).values, v.double().sort(0).values
    i, j, share = quantile_coupling(len(x), len(y))
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    variance = x.square().mean(0)
    covariance = (share.to(x)[:, None] * x[i.to(x.device)] * y[j.to(y.device)]).sum(0)
    # A spread below float32's resolution of the mean is rounding.
    constant = variance <= (mean_x * 2.0**-22).square()
    w = torch.where(constant, 1.0, covariance / variance.masked_fill(constant, 1.0))
    return _map(w.float(), (mean_y - w * mean_x).float())


def classifier_direction(z: Tensor, v: Tensor) -> ActivationMap:
    """Logistic regression from source to target; needs scikit-learn."""
    from sklearn.linear_model import LogisticRegression

    both = torch.cat([z, v]).double().cpu()
    labels = [0] * len(z) + [1] * len(v)
    spread = both.std(0, unbiased=False).clamp_min(_LEAST_STD)
    # Classified on standardized coordinates, so that large ones do not decide alone; the normal is of the raw space.
    found = LogisticRegression(max_iter=1000).fit((both / spread).numpy(), labels)
    normal = torch.from_numpy(found.coef_[0]) / spread
    normal = normal / normal.norm().clamp_min(torch.finfo(torch.float64).tiny)
    length = (both @ normal).std(unbiased=False)
    return _map(torch.ones(both.shape[1]), (normal * length).float())


def dampen_experts(z: Tensor, v: Tensor) -> ActivationMap:
    """AUROC of each coordinate by counting pairs; ties count half."""
    above = (z[:, None] > v[None]).double().mean((0, 1))
    equal = (z[:, None] == v[None]).double().mean((0, 1))
    auroc = above + 0.5 * equal
    w = torch.where(auroc > 0.5, 2.0 * (1.0 - auroc), 1.0)
    return _map(w.float(), torch.zeros_like(w).float())


def _map(w: Tensor, b: Tensor) -> ActivationMap:
    return ActivationMap(w.float().cpu(), b.float().cpu())
