# SPDX-License-Identifier: Apache-2.0
"""The unary functions that graphs may contain, each with the points where its derivative is k, in closed form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tilewright.verify.genbab.inverse import unary_relaxation
from tilewright.verify.genbab.unary import Unary

SILU_INFLECTION = 2.399357280515468  # the root of x tanh(x / 2) = 2
TWO_PI = 2 * math.pi
INF = math.inf


def _pair(x: Tensor) -> list[Tensor]:
    return [x, -x]


def _sigmoid_critical(k: Tensor, l: Tensor, u: Tensor) -> list[Tensor]:  # noqa: ARG001
    # 2 artanh(s) with s = sqrt(1 - 4k), written so that small k lose nothing.
    s = torch.sqrt(1 - 4 * k)
    return _pair(2 * torch.log1p(s) - torch.log(4 * k))


def _tanh_critical(k: Tensor, l: Tensor, u: Tensor) -> list[Tensor]:  # noqa: ARG001
    return _pair(torch.log1p(torch.sqrt(1 - k)) - 0.5 * torch.log(k))


def _sin_critical(k: Tensor, l: Tensor, u: Tensor) -> list[Tensor]:
    # On one branch c + 2 pi m the value of f - k x is linear in m, so the first and last m inside decide.
    c = torch.arccos(k)
    found = []
    for branch in _pair(c):
        found.append(branch + TWO_PI * torch.ceil((l - branch) / TWO_PI))
        found.append(branch + TWO_PI * torch.floor((u - branch) / TWO_PI))
    return found


def _erf_critical(k: Tensor, l: Tensor, u: Tensor) -> list[Tensor]:  # noqa: ARG001
    return _pair(torch.sqrt(-torch.log(k * (math.sqrt(math.pi) / 2))))


class _Sin(Unary):
    """sin: inflections at every multiple of pi, so the range of its slope is that of cos over [l, u]."""

    def slope_range(self, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.minimum(l.cos(), u.cos()), torch.maximum(l.cos(), u.cos())
        has_top = torch.floor(u / TWO_PI) >= torch.ceil(l / TWO_PI)
        has_bottom = torch.floor((u - math.pi) / TWO_PI) >= torch.ceil((l - math.pi) / TWO_PI)
        return torch.where(has_bottom, -torch.ones_like(l), low), torch.where(has_top, torch.ones_like(l), high)

    def free_sides(self, l: Tensor, u: Tensor) -> Tensor:
        half, same = torch.floor(l / math.pi), torch.floor(l / math.pi) == torch.floor(u / math.pi)
        odd = half.remainder(2) == 1
        return torch.stack([~(same & ~odd), ~(same & odd)])


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _root_limit(df: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The slope of a root at 0 is infinite: no tangent nearer to 0 than a thousandth of the midpoint is tried."""
    return lambda l, u: df(torch.maximum(l, (l + u) / 2 * 1e-3))


relu = Unary("relu", torch.relu, lambda x: (x > 0).to(x.dtype), kinks=(0.0,), curvature=(0, 0), convex=True)
absolute = Unary("abs", torch.abs, torch.sign, kinks=(0.0,), curvature=(0, 0), convex=True)
sign = Unary("sign", torch.sign, torch.zeros_like, jumps=((0.0, -1.0, 1.0),), curvature=(0, 0))
step = Unary("step", lambda x: (x > 0).to(x.dtype), torch.zeros_like, jumps=((0.0, 0.0, 1.0),), curvature=(0, 0))
sigmoid = Unary("sigmoid", torch.sigmoid, _sigmoid_slope, _sigmoid_critical, (0.0,), (1, -1))
tanh = Unary("tanh", torch.tanh, lambda x: 1 - torch.tanh(x) ** 2, _tanh_critical, (0.0,), (1, -1))
softplus = Unary(
    "softplus",
    torch.nn.functional.softplus,
    torch.sigmoid,
    lambda k, l, u: [torch.log(k) - torch.log1p(-k)],
    curvature=(1,),
)
arctan = Unary(
    "arctan", torch.atan, lambda x: 1 / (1 + x * x), lambda k, l, u: _pair(torch.sqrt(1 / k - 1)), (0.0,), (1, -1)
)
exp = Unary("exp", torch.exp, torch.exp, lambda k, l, u: [torch.log(k)], curvature=(1,))
log = Unary("log", torch.log, torch.reciprocal, lambda k, l, u: [1 / k], curvature=(-1,), domain=(0.0, INF), pole=0.0)
sqrt = Unary(
    "sqrt",
    torch.sqrt,
    lambda x: 0.5 / torch.sqrt(x),
    lambda k, l, u: [1 / (4 * k * k)],
    curvature=(-1,),
    domain=(0.0, INF),
    slope_limit=_root_limit(lambda x: 0.5 / torch.sqrt(x)),
)
reciprocal = Unary(
    "reciprocal",
    torch.reciprocal,
    lambda x: -1 / (x * x),
    lambda k, l, u: _pair(1 / torch.sqrt(-k)),
    (0.0,),
    (-1, 1),
    pole=0.0,
)
square = Unary("square", torch.square, lambda x: 2 * x, lambda k, l, u: [k / 2], curvature=(1,))
sin = _Sin("sin", torch.sin, torch.cos, _sin_critical)
erf = Unary(
    "erf",
    torch.erf,
    lambda x: (2 / math.sqrt(math.pi)) * torch.exp(-x * x),
    _erf_critical,
    (0.0,),
    (1, -1),
)


@functools.cache
def gelu(approximate: str = "none") -> Unary:
    """GELU: the erf form, or the tanh form with inflections of its own."""

    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x, approximate=approximate)

    if approximate == "none":

        def df(x: Tensor) -> Tensor:
            density = torch.exp(-x * x / 2) / math.sqrt(TWO_PI)
            return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * density

        return _own(unary_relaxation(f, df, (-math.sqrt(2), math.sqrt(2)), name="gelu"))

    root, cubic = math.sqrt(2 / math.pi), 0.044715

    def df_tanh(x: Tensor) -> Tensor:
        inner = root * (x + cubic * x**3)
        # 1 + tanh(y) = 2 sigmoid(2 y), and 1 - tanh(y)^2 = 4 sigmoid(2 y) sigmoid(-2 y).
        s, t = torch.sigmoid(2 * inner), torch.sigmoid(-2 * inner)
        slope = s * t * (2 * root * (1 + 3 * cubic * x * x))
        return s + x * torch.where(s * t == 0, torch.zeros_like(s), slope)

    top = _extremum(df_tanh, 1.0, 2.0)
    return _own(unary_relaxation(f, df_tanh, (-top, top), name="gelu_tanh"))


@functools.cache
def silu() -> Unary:
    """SiLU (swish)."""

    def df(x: Tensor) -> Tensor:
        s, t = torch.sigmoid(x), torch.sigmoid(-x)
        return s * (1 + x * t)

    inflections = (-SILU_INFLECTION, SILU_INFLECTION)
    return _own(unary_relaxation(torch.nn.functional.silu, df, inflections, name="silu"))


def _own(made: Unary) -> Unary:
    object.__setattr__(made, "builtin", True)
    return made


def _extremum(df: Callable[[Tensor], Tensor], left: float, right: float) -> float:
    """Where df is largest in [left, right], by ternary search."""
    for _ in range(80):
        a, b = left + (right - left) / 3, right - (right - left) / 3
        values = df(torch.tensor([a, b], dtype=torch.float64))
        left, right = (a, right) if values[0] < values[1] else (left, b)
    return (left + right) / 2


@functools.cache
def leaky_relu(slope: float) -> Unary:
    """LeakyReLU with any slope for x < 0."""
    return Unary(
        "leaky_relu",
        lambda x: torch.where(x > 0, x, slope * x),
        lambda x: torch.where(x > 0, torch.ones_like(x), torch.full_like(x, slope)),
        kinks=(0.0,),
        curvature=(0, 0),
        convex=slope <= 1,
        builtin=False,
    )


@functools.cache
def clip(low: float, high: float) -> Unary:
    """min(max(x, low), high); an infinite limit is none."""
    kinks = tuple(x for x in (low, high) if math.isfinite(x))
    return Unary(
        "clip",
        lambda x: x.clamp(low, high),
        lambda x: ((x > low) & (x < high)).to(x.dtype),
        kinks=kinks,
        curvature=(0,) * (len(kinks) + 1),
        builtin=False,
    )


@functools.cache
def elu(alpha: float) -> Unary:
    """ELU: x for x > 0, alpha (e^x - 1) else."""
    return Unary(
        "elu",
        lambda x: torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0))),
        lambda x: torch.where(x > 0, torch.ones_like(x), alpha * torch.exp(x.clamp(max=0))),
        lambda k, l, u: [torch.log(k / alpha)],
        kinks=(0.0,),
        curvature=(1, 0) if alpha >= 0 else None,
        convex=0 <= alpha <= 1,
        builtin=False,
    )


@functools.cache
def power(exponent: float) -> Unary:
    """x^n for an integer n >= 3 on the real line, x^p for any other p > 0 on x >= 0."""
    if exponent == int(exponent) and exponent >= 3:
        n = int(exponent)
        even = n % 2 == 0

        def critical(k: Tensor, l: Tensor, u: Tensor) -> list[Tensor]:  # noqa: ARG001
            root = (k.abs() / n) ** (1 / (n - 1))
            return [torch.sign(k) * root] if even else _pair(torch.where(k >= 0, root, torch.full_like(k, math.nan)))

        inflections, curvature = ((), (1,)) if even else ((0.0,), (-1, 1))
        return Unary(
            f"power{n}", lambda x: x**n, lambda x: n * x ** (n - 1), critical, inflections, curvature, builtin=False
        )
    p = exponent

    def df(x: Tensor) -> Tensor:
        return p * x ** (p - 1)

    return Unary(
        f"power{p}",
        lambda x: x**p,
        df,
        lambda k, l, u: [(k / p) ** (1 / (p - 1))],
        curvature=(1,) if p > 1 else (-1,),
        domain=(0.0, INF),
        slope_limit=_root_limit(df) if p < 1 else None,
        builtin=False,
    )


REGISTERED: dict[str, Unary] = {}
"""Functions that a user added, by the name of the operator in the traced graph or in ONNX."""


def register_relaxation(op: str, fn: Unary) -> None:
    """Let graphs contain a unary operator of one tensor argument.

    op: its name as the tracer sees it: ``"aten.mish"`` for a torch operator (package and name, no overload), or the
    operator type of an ONNX node (``"Mish"``). fn: from :func:`unary_relaxation`.

    Raises:
        TypeError: ``fn`` is no :class:`Unary`.
    """
    if not isinstance(fn, Unary):
        raise TypeError(f"fn is a {type(fn).__name__}; a Unary is needed, make one with unary_relaxation(f, df, ...)")
    REGISTERED[op] = fn
