# SPDX-License-Identifier: Apache-2.0
"""Functions with the range their intervals are drawn from, and random graphs, for the tests of GenBaB."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.verify.genbab import functions
from tilewright.verify.genbab.build import Builder, Value
from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.unary import Unary

UNARIES: dict[str, tuple[Unary, float, float]] = {
    "relu": (functions.relu, -5, 5),
    "leaky_relu": (functions.leaky_relu(0.1), -5, 5),
    "steep_leaky_relu": (functions.leaky_relu(1.7), -5, 5),
    "abs": (functions.absolute, -5, 5),
    "sign": (functions.sign, -5, 5),
    "step": (functions.step, -5, 5),
    "clip": (functions.clip(-0.5, 1.5), -5, 5),
    "elu": (functions.elu(1.0), -5, 5),
    "steep_elu": (functions.elu(1.6), -5, 5),
    "sigmoid": (functions.sigmoid, -12, 12),
    "tanh": (functions.tanh, -8, 8),
    "softplus": (functions.softplus, -10, 10),
    "arctan": (functions.arctan, -12, 12),
    "erf": (functions.erf, -5, 5),
    "exp": (functions.exp, -6, 4),
    "log": (functions.log, 1e-3, 9),
    "sqrt": (functions.sqrt, 0, 9),
    "reciprocal": (functions.reciprocal, 0.05, 6),
    "negative_reciprocal": (functions.reciprocal, -6, -0.05),
    "square": (functions.square, -4, 4),
    "cube": (functions.power(3), -3, 3),
    "fourth": (functions.power(4), -3, 3),
    "power1.5": (functions.power(1.5), 0, 5),
    "power0.3": (functions.power(0.3), 0, 5),
    "sin": (functions.sin, -12, 12),
    "gelu": (functions.gelu(), -8, 8),
    "gelu_tanh": (functions.gelu("tanh"), -8, 8),
    "silu": (functions.silu(), -14, 14),
}


def intervals(low: float, high: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random intervals of all widths, some of them points, some ending at 0."""
    generator = torch.Generator().manual_seed(seed)
    a = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    width = (high - low) * torch.rand(count, generator=generator, dtype=torch.float64) ** 3
    l, u = a, torch.clamp(a + width, max=high)
    u[::17] = l[::17]
    if low < 0 < high:
        u[5::23] = torch.where(l[5::23] < 0, torch.zeros_like(u[5::23]), u[5::23])
    return l, u


def inside(l: Tensor, u: Tensor, count: int) -> Tensor:
    """Evenly spaced points of each interval, ends included: [count, *l.shape]."""
    t = torch.linspace(0, 1, count, dtype=l.dtype).reshape(-1, *(1,) * l.dim())
    return torch.minimum(l + t * (u - l), u)


SAFE = (
    "sigmoid",
    "tanh",
    "arctan",
    "erf",
    "sin",
    "gelu",
    "silu",
    "relu",
    "abs",
    "clip",
    "leaky_relu",
    "elu",
    "softplus",
)


def random_graph(seed: int) -> Graph:
    """A few random operators on three inputs: affine maps, functions, products, divisions, maxima, softmax."""
    generator = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    b = Builder((1, 3))
    values: list[Value] = [b.input]
    for _ in range(1 + pick(3)):
        x = values[-1] if pick(3) else values[pick(len(values))]
        kind = pick(10)
        n = x.shape[-1]
        y = b.linear(x, normal(2 + pick(3), n) / n**0.5, normal(1)[0])
        assert isinstance(y, Value)
        if kind < 5:
            y = b.unary(UNARIES[SAFE[pick(len(SAFE))]][0], y)
        elif kind == 5:
            y = b.mul(y, y)
        elif kind == 6:
            other = values[pick(len(values))]
            y = b.mul(y, b.linear(other, normal(y.shape[-1], other.shape[-1]) / other.shape[-1] ** 0.5))
        elif kind == 7:
            y = b.div(y, b.add(b.mul(y, y), 0.5 + float(normal(1).abs())))
        elif kind == 8:
            y = b.maximum(y, b.linear(x, normal(y.shape[-1], n) / n**0.5)) if pick(2) else b.max_over(y, -1, True)
        else:
            y = b.softmax(y, -1) if pick(2) else b.layer_norm(y, 1, None, None, 0.1)
        assert isinstance(y, Value)
        values.append(y)
    last = values[-1]
    out = b.add(b.linear(last, normal(2, last.shape[-1])), b.linear(values[0], 0.3 * normal(2, 3)))
    assert isinstance(out, Value)
    return b.graph(out)


def random_boxes(seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """Boxes [batch, 3] from tiny to wide, one of them a point on one axis."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn((batch, 3), generator=generator, dtype=torch.float64)
    radius = 10 ** (-2.5 + 2.7 * torch.rand((batch, 1), generator=generator, dtype=torch.float64))
    radius = radius * torch.rand((batch, 3), generator=generator, dtype=torch.float64)
    radius[0, 0] = 0
    return middle - radius, middle + radius
