# SPDX-License-Identifier: Apache-2.0
"""What LinEAS's claim shows without a language model: the distance, its gradient, one layer, the proximal step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from tilewright.claims import Experiment, Row, at_most
from tilewright.steer.baselines.closed_forms import sorted_least_squares
from tilewright.steer.lineas.loss import distributional_losses
from tilewright.steer.lineas.method import LinEASConfig, fit
from tilewright.steer.lineas.prox import prox_sparse_group
from tilewright.steer.problem import Problem


def quantile_integral(x: np.ndarray, y: np.ndarray) -> float:
    """The squared distance of two samples as the integral over merged breakpoints, with searchsorted, in float64."""
    n, m = len(x), len(y)
    x, y = np.sort(x), np.sort(y)
    # Merged as fractions of n * m, which integers hold exactly; the middle of each piece decides who owns it.
    ends = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    middle = (ends[:-1] + ends[1:]) / 2
    i = np.searchsorted(np.arange(1, n + 1) * m, middle)
    j = np.searchsorted(np.arange(1, m + 1) * n, middle)
    return float(np.sum((x[i] - y[j]) ** 2 * np.diff(ends)) / (n * m))


def distance_rows() -> Iterator[Row]:
    """Item 1: the operator against the oracle and finite differences."""
    from tilewright.ops.sorted_w2 import sorted_w2

    random = np.random.default_rng(0)
    worst = 0.0
    for n, m in ((1, 1), (16, 16), (32, 32), (7, 5), (32, 20), (3, 64)):
        z, v = random.normal(size=(n, 40)), random.normal(size=(m, 40)) * 2 + 1
        got = sorted_w2(torch.from_numpy(z), torch.from_numpy(v)).numpy()
        wanted = np.array([quantile_integral(z[:, j], v[:, j]) for j in range(40)])
        worst = max(worst, float(np.max(np.abs(got - wanted) / wanted)))
    yield at_most("sorted_w2 against the quantile integral, equal and unequal sizes, relative error", worst, 1e-6)
    # Grid values, permuted: no two of a column are closer than a step of finite differences can cross.
    leaves = tuple(
        torch.from_numpy(np.stack([random.permutation(n) for _ in range(6)], 1) * 0.37 + offset).requires_grad_()
        for n, offset in ((9, 0.0), (6, 0.11))
    )
    right = torch.autograd.gradcheck(sorted_w2, leaves, raise_exception=False)
    yield Row(
        "gradient of sorted_w2 by finite differences, float64", "", "passes" if right else "fails", "passes", right
    )


class OneLayer(nn.Module):
    """Rows of a table, one a text, through one place."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(rows, freeze=True)
        self.place = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T] to [B, T, C]."""
        del attention_mask
        return self.place(self.table(input_ids))


def one_layer_row(experiment: Experiment) -> Row:
    """Item 2: with one layer and no regulariser, the closed form of Lin-AcT, where its slope is positive."""
    random = torch.Generator().manual_seed(1)
    source = torch.randn(32, 24, generator=random) * 0.8 + 0.3
    target = torch.randn(32, 24, generator=random) * 1.3 - 0.5
    problem = Problem.of(
        OneLayer(torch.cat([source, target])), [[i] for i in range(32)], [[i] for i in range(32, 64)], modules="place"
    )
    found = fit(problem, LinEASConfig(steps=400 if experiment.quick else 1000), progress=False)
    closed = sorted_least_squares(source, target)
    losses = [
        float(distributional_losses({"place": one(source)}, {"place": target})["place"])
        for one in (found.maps["place"], closed)
    ]
    assert bool((closed.weight > 0).all())
    return at_most("one layer: loss of LinEAS over Lin-AcT's closed form, less 1", abs(losses[0] / losses[1] - 1), 1e-3)


def prox_rows() -> Iterator[Row]:
    """Item 3: the proximal step against a numerical minimiser; the fixed point for a large gamma."""
    from scipy.optimize import minimize

    random = np.random.default_rng(2)
    worst = 0.0
    thresholds, metrics = ((0.3, 0.0), (0.0, 0.7), (0.2, 0.5), (0.4, 9.0)), (np.ones(6), np.geomspace(0.03, 30.0, 6))
    for (t1, tg), c in itertools.product(thresholds, metrics):
        v = random.normal(size=6)

        def objective(
            parts: np.ndarray, v: np.ndarray = v, c: np.ndarray = c, t1: float = t1, tg: float = tg
        ) -> tuple[float, np.ndarray]:
            # u = p - q with p, q >= 0 makes the first norm smooth; the second is guarded where it is not.
            u = parts[:6] - parts[6:]
            length = np.sqrt(np.sum(u**2) + 1e-18)
            slope = c * (u - v) + tg * u / length
            value = 0.5 * np.sum(c * (u - v) ** 2) + t1 * np.sum(parts) + tg * length
            return value, np.concatenate([slope + t1, t1 - slope])

        start = np.concatenate([np.maximum(v, 0), np.maximum(-v, 0)])
        options = {"maxiter": 20000, "maxfun": 100000, "ftol": 1e-16, "gtol": 1e-12}
        least = minimize(objective, start, jac=True, bounds=[(0, None)] * 12, method="L-BFGS-B", options=options)
        metric = None if (c == 1.0).all() else torch.from_numpy(c)
        u = prox_sparse_group(torch.from_numpy(v), t1, tg, metric).numpy()
        value = 0.5 * np.sum(c * (u - v) ** 2) + t1 * np.sum(np.abs(u)) + tg * np.linalg.norm(u)
        worst = max(worst, value - float(least.fun))
    yield at_most("proximal step, plain and in a metric: objective above a numerical minimum", worst, 1e-6)
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    problem = Problem.of(OneLayer(rows), [[i] for i in range(8)], [[i] for i in range(8, 16)], modules="place")
    found = fit(problem, LinEASConfig(steps=20, gamma=100.0), progress=False)
    yield at_most(
        "large gamma: share of coordinates that are not exactly the identity", found.support(), 0.0, paper="0"
    )
