# SPDX-License-Identifier: Apache-2.0
"""Sparsing Law's claim without a model: the definition of CETT, and laws recovered from published parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tilewright.capture import tapped
from tilewright.claims import Experiment, Row, at_least, at_most
from tilewright.reference import cett as oracle
from tilewright.sparsify.sparsing_law.cett import TailError
from tilewright.sparsify.sparsing_law.laws import Kind, Law, fit_activation_law

WIDTH, NEURONS, TOKENS = 32, 64, 200
TARGETS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.8)
# Rows of the paper's tables 4 and 5: alpha, b, c, A0 (ReLU) and alpha, c, A0 (SiLU); D in billions of tokens.
RELU = {
    "0.1B": (0.101, -0.0151, 3.20, 0.0614),
    "0.2B": (0.449, -3.05, 0.286, 0.0674),
    "0.4B": (0.683, -3.46, 0.0790, 0.0690),
    "0.8B": (1.01, -3.49, 7.97e-3, 0.0721),
    "1.2B": (1.33, -3.89, 9.03e-4, 0.0782),
    "2.4B": (1.53, -3.46, 1.56e-4, 0.0648),
}
SILU = {
    "0.1B": (0.479, 0.102, 0.409),
    "0.2B": (0.844, 0.208, 0.390),
    "0.4B": (1.03, 0.420, 0.385),
    "0.8B": (0.995, 0.562, 0.383),
    "1.2B": (0.967, 0.538, 0.382),
}
POINTS, NOISE = 60, 3e-3


class Gated(nn.Module):
    """A gated block in float64."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, NEURONS, bias=False, dtype=torch.float64)
        self.up_proj = nn.Linear(WIDTH, NEURONS, bias=False, dtype=torch.float64)
        self.down_proj = nn.Linear(NEURONS, WIDTH, bias=False, dtype=torch.float64)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


def seen_by_hook(seed: int, act: nn.Module) -> tuple[Tensor, Tensor]:
    """h [T, m] as a hook on the down projection sees it, and Wo [d, m]."""
    torch.manual_seed(seed)
    block, seen = Gated(act), []
    with torch.no_grad(), tapped(block, {"down_proj@input": lambda _, x: seen.append(x)}):
        block(torch.randn(TOKENS, WIDTH, dtype=torch.float64))
    return seen[0], block.down_proj.weight.detach()


def definition_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 1: CETT against sums of neuron vectors, thresholds against the sorted oracle."""
    experiment.say("definition of CETT")
    wrong, apart, above = [], [], []
    for seed, act in ((0, nn.SiLU()), (1, nn.ReLU())):
        h, weight = seen_by_hook(seed, act)
        layer = TailError(h, weight)
        for target in TARGETS[::2] if experiment.quick else TARGETS:
            best = oracle.cett_threshold(h, weight, target)
            eps = layer.threshold(target)
            reached = oracle.cett(h, weight, eps)
            # Just below the norm that ``best`` is: on it, rounding says whether that neuron counts.
            below = best * (1 - 1e-12)
            wrong.append(abs(layer.error(below) - oracle.cett(h, weight, below)))
            apart.append(abs(reached - oracle.cett(h, weight, best)))
            above.append(reached - target)
    yield at_most("CETT from the hook against summed neuron vectors, largest difference", max(wrong), 1e-10)
    yield at_most("CETT reached, search against all sorted norms, largest difference", max(apart), 1e-3)
    yield at_most("CETT reached above the target, most", max(above), 1e-3)


def published(kind: Kind, name: str) -> tuple[Law, np.ndarray]:
    """A published law and 60 token counts, evenly spaced over the run of its model."""
    values: Any = RELU[name] if kind == "relu" else SILU[name]
    names = ("alpha", "b", "c", "A0") if kind == "relu" else ("alpha", "c", "A0")
    tokens = np.linspace(8, 800 if name == "2.4B" else 270, POINTS) * 1e9
    span = (float(tokens[0]), float(tokens[-1]))
    return Law(kind, dict(zip(names, values, strict=True)), [], None, {}, 0.0, span), tokens


def exponent_error(law: Law, tokens: np.ndarray) -> float:
    """Standard error of alpha that the noise allows (Cramer-Rao): relative noise is added to log A, A = predict(D)."""
    columns = []
    for name, value in law.params.items():
        step = 1e-5 * abs(value)
        ends = [law.params | {name: value + sign * step} for sign in (1, -1)]
        above, below = (np.log(dataclasses.replace(law, params=params).predict(tokens)) for params in ends)
        columns.append((above - below) / 2e-5)
    # Columns are d log A / d log |parameter|: this row of the inverse is the relative change of alpha.
    row = np.linalg.pinv(np.stack(columns, 1), rcond=1e-12)[list(law.params).index("alpha")]
    return float(NOISE * np.linalg.norm(row) * law.params["alpha"])


def fit_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 5: limits, exponents and forms recovered from noisy points on the published curves."""
    experiment.say("fits of published laws")
    limits, exponents, right, inverse = [], {"relu": [0.0], "silu": [0.0]}, [], []
    deviations = []
    found: list[dict[str, Any]] = []
    kinds: tuple[tuple[Kind, Any], ...] = (("relu", RELU), ("silu", SILU))
    for seed in range(1 if experiment.quick else 3):
        random = np.random.default_rng(seed)
        for kind, rows in kinds:
            for name in rows:
                law, tokens = published(kind, name)
                noisy = law.predict(tokens) * (1 + NOISE * random.standard_normal(POINTS))
                fit = fit_activation_law(tokens, noisy, bootstrap=0)
                limits.append(abs(fit.limit / law.limit - 1))
                right.append(fit.kind == kind)
                if fit.kind == kind:
                    exponents[kind].append(abs(fit.params["alpha"] - law.params["alpha"]))
                    deviations.append(exponents[kind][-1] / exponent_error(law, tokens))
                inverse.append(max(abs(fit.tokens_to(fit.predict(d)) / d - 1) for d in tokens[:: POINTS // 4]))
                found.append({"kind": kind, "model": name, "seed": seed, "fit": fit.params, "true": law.params})
    experiment.values["fits"] = found
    count = len(limits)
    yield at_most(f"limit of {count} noisy published curves, largest relative error", max(limits), 0.03)
    # Of 33 normal errors one is beyond four standard errors with probability 0.002.
    yield at_most("exponent, largest error in standard errors that the noise allows", max(deviations), 4.0)
    yield experiment.in_full(at_most("exponent, ReLU curves, largest error", max(exponents["relu"]), 0.05))
    yield experiment.in_full(at_most("exponent, SiLU curves, largest error", max(exponents["silu"]), 0.1))
    yield at_least(f"right form chosen by AIC, of {count}", sum(right), count)
    yield at_most("tokens to a predicted ratio, largest relative error", max(inverse), 1e-6)
