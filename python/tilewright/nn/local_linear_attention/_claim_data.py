# SPDX-License-Identifier: Apache-2.0
"""Items 4 and 5: strictly causal prediction of moving linear maps and of two real data sets.

Three predictors see the pairs (x_j, y_j) before the query x_i: local linear attention, the kernel average (softmax
attention's estimate) and the ridge regression of all pairs so far with equal weights. The baselines are written out in
torch. Bandwidth h and ridge are chosen on other data.

Weights are exp(-|x_i - x_j|^2 / 2 h^2). A softmax of inner products gives them on a sphere: points are lifted by one
coordinate, sqrt(R^2 - |x|^2), with a constant R that no point exceeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tilewright.claims import Experiment, Row, at_least, at_most

TOKENS, SEGMENT = 1024, 256
SPREAD, WIDTH, NOISE = 3.0, 1.0, 0.1
VALIDATION, TESTS = (100, 101), (0, 1, 2, 3)
BOUNDS = {4: 0.6, 8: 0.4, 16: 0.3}
BANDWIDTHS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TOTAL_RIDGES = (1e-3, 1e-1, 1.0, 10.0, 100.0)

Predictor = Callable[..., Tensor]


def lifted(x: Tensor, radius: float) -> Tensor:
    """x with one coordinate more, on the sphere of this radius."""
    rest = radius**2 - x.square().sum(-1, keepdim=True)
    if bool((rest < 0).any()):
        raise ValueError(f"a point lies outside of the radius {radius}")
    return torch.cat([x, rest.sqrt()], -1)


def local_linear(x: Tensor, y: Tensor, bandwidth: float, ridge: float, radius: float) -> Tensor:
    """Predictions of y[1:], each from the pairs before it."""
    from tilewright.ops import lla_attention

    points = lifted(x, radius)
    o: Tensor = lla_attention(
        points[None, 1:], points[None, :-1], y[None, :-1], ridge_lambda=ridge, scale=bandwidth**-2, solver="direct"
    )
    return o[0]


def kernel_average(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """The same by Nadaraya and Watson's average."""
    score = -torch.cdist(x[1:], x[:-1]).square() / (2 * bandwidth**2)
    visible = torch.ones(score.shape, dtype=torch.bool).tril()
    return score.masked_fill(~visible, -torch.inf).softmax(-1) @ y[:-1]


def running_ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """The same by ridge regression with intercept on all pairs so far."""
    rows = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], -1)
    seen = rows[:-1]
    gram = torch.einsum("ta,tb->tab", seen, seen).cumsum(0)
    cross = torch.einsum("ta,tc->tac", seen, y[:-1]).cumsum(0)
    penalty = ridge * torch.eye(rows.shape[1], dtype=x.dtype)
    penalty[0, 0] = 1e-9
    return torch.einsum("ta,tac->tc", rows[1:], torch.linalg.solve(gram + penalty, cross))


def piecewise(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """x, y `[T, d]`: in each segment x lies around a centre of its own and y = x A + noise with a map of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    xs, ys = [], []
    for _ in range(TOKENS // SEGMENT):
        centre, slope = SPREAD * normal(size), normal(size, size) / size**0.5
        x = centre + WIDTH * normal(SEGMENT, size)
        xs.append(x)
        ys.append(x @ slope + NOISE * normal(SEGMENT, size))
    return torch.cat(xs), torch.cat(ys)


def squared_errors(predicted: Tensor, y: Tensor) -> Tensor:
    """Mean over outputs, `[T - 1]`."""
    return (predicted - y[1:]).square().mean(-1)


def last_quarters(errors: Tensor) -> Tensor:
    """Mean over the last quarter of each segment, `[segments]`."""
    return torch.stack([errors[end - 1 - SEGMENT // 4 : end - 1].mean() for end in range(SEGMENT, TOKENS + 1, SEGMENT)])


def choices(radius: float) -> dict[str, tuple[Predictor, list[tuple[float, ...]]]]:
    """Each predictor with its grid; the kernel average's reaches to narrower windows, which it prefers."""

    def lla(x: Tensor, y: Tensor, bandwidth: float, ridge: float) -> Tensor:
        return local_linear(x, y, bandwidth, ridge, radius)

    return {
        "LLA": (lla, list(itertools.product(BANDWIDTHS, RIDGES))),
        "kernel average": (kernel_average, [(h,) for h in (0.15, 0.25, *BANDWIDTHS)]),
        "running ridge": (running_ridge, [(r,) for r in TOTAL_RIDGES]),
    }


def choose(
    predict: Predictor, grid: list[tuple[float, ...]], tuning: list[tuple[Tensor, Tensor]], segments: slice
) -> tuple[float, ...]:
    """The setting with the smallest error in the last quarters of these segments."""
    tried = [
        sum(float(last_quarters(squared_errors(predict(x, y, *setting), y))[segments].mean()) for x, y in tuning)
        for setting in grid
    ]
    return grid[tried.index(min(tried))]


def piecewise_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 4. One setting for the whole sequence, but for the ridge regression's own domain, the first segment."""
    found = experiment.values["piecewise"] = {}
    validation = VALIDATION[:1] if experiment.quick else VALIDATION
    tests = TESTS[:2] if experiment.quick else TESTS
    first, first_of_all, later = [], [], []
    for size, bound in BOUNDS.items():
        experiment.say(f"piecewise linear maps, d = {size}")
        tuning, held = [piecewise(size, s) for s in validation], [piecewise(size, s) for s in tests]
        quarters: dict[str, Tensor] = {}
        record: dict[str, Any] = {"curves": {}, "edges": list(range(SEGMENT, TOKENS, SEGMENT)), "chosen": {}}
        predictors = choices(4 * SPREAD * size**0.5)
        for name, (predict, grid) in predictors.items():
            chosen = choose(predict, grid, tuning, slice(None))
            errors = torch.stack([squared_errors(predict(x, y, *chosen), y) for x, y in held])
            quarters[name] = torch.stack([last_quarters(e) for e in errors]).mean(0)
            smooth = errors.mean(0)[31:].view(-1, 32).mean(-1)  # from token 32 on: the first error is that of token 1
            record["curves"][name] = {"token": list(range(48, TOKENS, 32)), "mse": smooth.tolist()}
            record["chosen"][name] = list(chosen)
        _, ridges = predictors["running ridge"]
        own = choose(running_ridge, ridges, tuning, slice(1))
        at_home = torch.stack([last_quarters(squared_errors(running_ridge(x, y, *own), y))[0] for x, y in held]).mean()
        record["chosen"]["running ridge, first segment"] = list(own)
        record["last quarters"] = {name: values.tolist() for name, values in quarters.items()}
        found[str(size)] = record
        ratio = float(quarters["LLA"].mean() / quarters["kernel average"].mean())
        title = f"piecewise linear maps, d = {size}: last quarters, LLA over kernel average"
        yield at_most(title, ratio, bound, paper="LLA below softmax, more so with d")
        first.append(float(at_home / quarters["LLA"][0]))
        first_of_all.append(float(quarters["running ridge"][0] / quarters["LLA"][0]))
        later.append(float((quarters["running ridge"][1:] / quarters["LLA"][1:]).min()))
    paper = "the global fit best in segment 1 only"
    yield at_most("first segment: global ridge, chosen for it, over LLA, largest over d", max(first), 1.0, paper=paper)
    name = "the same with the ridge chosen for all segments"
    yield Row(name, paper, max(first_of_all), "reported", True)
    yield at_least("later segments: global ridge over LLA, smallest over d", min(later), 1.0, paper=paper)


def real_data() -> dict[str, tuple[Tensor, Tensor]]:
    """Standardised diabetes (442 x 10, one target); digits: the 2 x 2 centre from 12 components of the other pixels."""
    import numpy as np

    try:
        from sklearn.datasets import load_diabetes, load_digits
    except ImportError as error:
        raise ImportError("the real data of this claim come with scikit-learn: pip install scikit-learn") from error

    def standard(x: Any) -> Any:
        return (x - x.mean(0)) / x.std(0)

    diabetes = load_diabetes()
    images = load_digits().images[:400]
    inner = np.zeros((8, 8), dtype=bool)
    inner[3:5, 3:5] = True
    others = images[:, ~inner]
    others = others - others.mean(0)
    components = others @ np.linalg.svd(others, full_matrices=False)[2][:12].T
    return {
        "diabetes": (torch.tensor(standard(diabetes.data)), torch.tensor(standard(diabetes.target[:, None]))),
        "digits": (torch.tensor(components / components[:, 0].std()), torch.tensor(standard(images[:, inner]))),
    }


def real_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 5: hyper-parameters by the error on the first third, the rest is the result."""
    found = experiment.values["real"] = {}
    bandwidths = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
    ridges = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    for name, (x, y) in real_data().items():
        experiment.say(f"running prediction of {name}")
        radius, third = 4 * x.shape[1] ** 0.5, len(y) // 3
        predictors: dict[str, tuple[Predictor, list[tuple[float, ...]]]] = {
            "LLA": (local_linear, [(*g, radius) for g in itertools.product(bandwidths, ridges)]),
            "kernel average": (kernel_average, [(h,) for h in bandwidths]),
            "running ridge": (running_ridge, [(r,) for r in (0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)]),
        }
        result = found[name] = {}
        for method, (predict, grid) in predictors.items():
            errors = {g: squared_errors(predict(x, y, *g), y) for g in grid}
            chosen = min(errors, key=lambda g: float(errors[g][:third].mean()))
            result[method] = {"mse": float(errors[chosen][third:].mean()), "chosen": list(chosen)}
        best = min(("kernel average", "running ridge"), key=lambda m: float(result[m]["mse"]))
        title = f"{name}, running prediction: LLA {result['LLA']['mse']:.3f} over the better baseline's ({best})"
        yield at_most(title, result["LLA"]["mse"] / result[best]["mse"], 1.02)
