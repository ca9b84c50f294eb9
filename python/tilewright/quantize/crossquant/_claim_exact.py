# SPDX-License-Identifier: Apache-2.0
"""The parts of CrossQuant's claim that need no language model: identities, a classifier of digits, speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tilewright.claims import Experiment, Row, at_least, at_most
from tilewright.quantize.crossquant.linear import CrossQuantLinear, quantize_rows
from tilewright.quantize.crossquant.scales import column_factors, crossquant, fake_crossquant

SEEDS = (0, 1, 2)


def heavy_tailed(seed: int, tokens: int = 256, width: int = 512) -> Tensor:
    """Student-t activations (3 degrees of freedom) with column sizes over three decades."""
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(tokens, width, generator=random)
    chi = torch.randn(tokens, width, 3, generator=random).square().mean(-1).sqrt()
    return normal / chi * torch.exp(torch.randn(width, generator=random) * 1.5)


def identity_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 1, each the worst of three heavy-tailed matrices."""
    experiment.say("identities on heavy-tailed matrices")
    beyond, tighter, apart, off, tokens, channels = [], [], [], [], 0, 0
    for seed in SEEDS:
        x = heavy_tailed(seed)
        _, row, col = crossquant(x)
        beyond.append(float((x.abs() / (127 * row * col)).max()))
        c = x.abs().amax(0)
        tighter.append(float((crossquant(x, 8, 0.15, c, "tight")[1] / row).max()))
        w = torch.randn(96, x.shape[1], generator=torch.Generator().manual_seed(seed + 9))
        layer = CrossQuantLinear(w, None, column_factors(c))
        # The layer's codes multiplied in float64, with scales that it did not compute, and those codes beside the exact
        # quotients: where one is nearly halfway either neighbour may be taken.
        rows = x.double() / column_factors(c).double()
        step = rows.abs().amax(1, keepdim=True) / 127
        codes = quantize_rows(x, 8, layer.inverse)[0].double()
        off.append(float((codes - rows / step).abs().max()))
        what = layer.codes.double() * layer.weight_scale.double()
        y = (codes * step) @ what.T
        apart.append(float((layer(x) - y).abs().max() / y.abs().max()))
        q1, q0 = crossquant(x, 8, 1.0)[0], crossquant(x, 8, 0.0)[0]
        tokens += int((q1 != (x / (x.abs().amax(1, keepdim=True) / 127)).round()).sum())
        channels += int((q0 != (x / (c * (torch.ones(()) / 127))).round()).sum())
    yield at_most("dynamic: largest |x| over Qmax steps (nothing clips)", max(beyond), 1 + 1e-5, paper="1")
    yield at_most("tight: largest row scale over t^alpha", max(tighter), 1 + 1e-5, paper="1")
    yield at_most("integer layer against float64 on the same grid, relative", max(apart), 1e-5)
    yield at_most("its codes against float64, in codes (half a step, and six float32 roundings of up to 127)", max(off),
                  0.5 + 127 * 6 * 2**-24, paper="1/2")  # fmt: skip
    yield at_most("alpha = 1: codes that differ from per token", tokens, 0, paper="0")
    yield at_most("alpha = 0: codes that differ from per channel", channels, 0, paper="0")


def digit_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 8: a classifier of digits whose input columns differ by up to 2^12 in size, activations in 4 bits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier

    experiment.say("digits")
    pixels, labels = load_digits(return_X_y=True)
    gaps, found = [], []
    for seed in SEEDS[: 1 if experiment.quick else None]:
        train_x, test_x, train_y, test_y = train_test_split(pixels / 16, labels, test_size=0.4, random_state=seed)
        net = MLPClassifier((64,), max_iter=250, tol=1e-3, random_state=seed).fit(train_x, train_y)
        random = torch.Generator().manual_seed(seed)
        sizes = torch.exp2(torch.rand(64, generator=random) * 12 - 6)
        x, c = torch.tensor(test_x).float() * sizes, (torch.tensor(train_x).float() * sizes).abs().amax(0)
        w, b = torch.tensor(net.coefs_[0]).float().T / sizes, torch.tensor(net.intercepts_[0]).float()
        head, offset = torch.tensor(net.coefs_[1]).float(), torch.tensor(net.intercepts_[1]).float()

        def accuracy(layer: Callable[[Tensor], Tensor]) -> float:
            guess = (layer(x).relu() @ head + offset).argmax(1)  # noqa: B023
            return float((guess == torch.tensor(test_y)).double().mean()) * 100  # noqa: B023

        exact = accuracy(lambda v: v @ w.T + b)  # noqa: B023
        plain = accuracy(CrossQuantLinear(w, b, torch.ones(64), a_bits=4))
        tight = accuracy(CrossQuantLinear(w, b, column_factors(c), a_bits=4))
        found.append({"float": exact, "per token": plain, "tight": tight})
        gaps.append(tight - plain)
    experiment.values["digits"] = found
    yield at_least("digits, A4: accuracy of tight over per token, points, least of the seeds", min(gaps), 5.0)


def fastest(*functions: Callable[[], object], repeats: int = 15) -> list[float]:
    """Least seconds of each, taken in turn so that other work on the machine meets all of them."""
    least = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            least[i] = min(least[i], time.perf_counter() - start)
    return least


def speed_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 7; judged in the full form only."""
    experiment.say("speed")
    x, c = torch.randn(512, 4096), torch.rand(4096) + 0.5
    u = column_factors(c)
    inverse = 1 / u

    def eager() -> Tensor:
        y = x / u
        scale = y.abs().amax(-1, keepdim=True) / 127
        return (y / scale).round().to(torch.int8)

    slow, fast = fastest(eager, lambda: quantize_rows(x, 8, inverse))
    w = torch.randn(1024, 4096)
    plain = CrossQuantLinear(w, None, torch.ones(4096), folded=True)
    folded, online = CrossQuantLinear(w, None, u, folded=True), CrossQuantLinear(w, None, u)
    experiment.values["speed"] = {"eager": slow, "fused": fast}
    yield experiment.in_full(at_least("divide and quantize [512, 4096]: eager torch over ours, time", slow / fast, 4.0))
    for tokens in (1, 512):
        some = x[:tokens]
        base, time_folded, time_online = fastest(lambda: plain(some), lambda: folded(some), lambda: online(some))  # noqa: B023
        name = f"CrossQuantLinear over per-token INT8, {tokens} token{'s' if tokens > 1 else ''}, time"
        yield experiment.in_full(at_most(f"{name}, folded", time_folded / base, 1.10))
        yield Row(f"{name}, multiplied online", "", time_online / base, "reported", True)


def gradient_row() -> Row:
    """The straight-through gradient of the fake form is that of the identity."""
    x = heavy_tailed(0, 8, 16).requires_grad_()
    fake_crossquant(x).sum().backward()
    assert x.grad is not None
    return at_most("fake form: gradient against the identity's", float((x.grad - 1).abs().max()), 0.0)
