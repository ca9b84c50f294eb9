# SPDX-License-Identifier: Apache-2.0
"""Lines of every unary function and planes of products: sound for any slope, tight for the default one."""

from __future__ import annotations

import math

import pytest
import torch
from genbab_cases import UNARIES, inside, intervals

from tilewright.verify.genbab import functions, register_relaxation, unary_relaxation
from tilewright.verify.genbab.bounds import initial_t, lines, slope_map
from tilewright.verify.genbab.graph import Node, Product
from tilewright.verify.genbab.split_table import area, build, points, table_of

COUNT, POINTS = 400, 201


def violation(fn, k, b, l, u):
    """How far f leaves the two lines on a grid of each interval, at most."""
    x = inside(l, u, POINTS)
    y = fn.f(x)
    below, above = k[0] * x + b[0] - y, y - (k[1] * x + b[1])
    return float(torch.maximum(below, above).max())


@pytest.mark.parametrize("name", UNARIES)
def test_default_and_random_slopes_are_sound(name):
    fn, low, high = UNARIES[name]
    l, u = intervals(low, high, COUNT, 1)
    k = fn.default_slopes(l, u)
    assert violation(fn, k, fn.intercepts(k, l, u), l, u) <= 1e-12 * (1 + float(fn.f(u).abs().max()))
    generator = torch.Generator().manual_seed(2)
    for scale in (0.1, 1.0, 10.0):
        k = scale * torch.randn((2, COUNT), generator=generator, dtype=torch.float64)
        assert violation(fn, k, fn.intercepts(k, l, u), l, u) <= 1e-12 * (1 + 14 * scale)


@pytest.mark.parametrize("name", UNARIES)
def test_parameters_between_0_and_1_are_sound_and_give_back_the_default(name):
    fn, low, high = UNARIES[name]
    l, u = intervals(low, high, COUNT, 3)
    node = Node(name, fn, (0,), (COUNT,))
    slopes = slope_map(fn, l[None], u[None])
    t = torch.rand((2, 1, 5, COUNT), dtype=torch.float64)
    found = lines(node, [(l[None], u[None])], slopes, t)
    for row in range(5):
        k, b = found.slopes[0][:, 0, row], found.bias[:, 0, row]
        assert violation(fn, k, b, l, u) <= 1e-10 * (1 + float(fn.f(u).abs().max()))
    start = lines(node, [(l[None], u[None])], slopes, initial_t(slopes, (1, 1, COUNT)))
    default = lines(node, [(l[None], u[None])], slopes)
    middle = (l + u) / 2
    for a, b in ((start, default),):
        one, two = a.slopes[0] * middle + a.bias, b.slopes[0] * middle + b.bias
        assert torch.allclose(one, two, atol=1e-5 * (1 + float(two.abs().max())), rtol=0)


def hull_area(fn, l, u, count=801):
    """Least area between two lines, from the convex hull of a fine sample: the support at the midpoint."""
    x = inside(l, u, count)
    y = fn.f(x)
    m = count // 2
    best = []
    for sign in (1.0, -1.0):
        g = sign * y
        left, right = g[:m], g[m + 1 :]
        # The envelope's value at the midpoint is the lowest chord over it.
        wl, wr = x[m] - x[:m], x[m + 1 :] - x[m]
        chords = (left[:, None] * wr[None] + right[None] * wl[:, None]) / (wl[:, None] + wr[None])
        best.append(torch.minimum(chords.amin((0, 1)), g[m]) * sign)
    return (best[1] - best[0]) * (u - l)


@pytest.mark.parametrize("name", [n for n in UNARIES if n not in ("sign", "step", "exp")])
def test_default_lines_enclose_the_least_area(name):
    fn, low, high = UNARIES[name]
    l, u = intervals(low, high, 60, 4)
    wide = u - l > 0.05
    l, u = l[wide], u[wide]
    ours, least = area(fn, l, u), hull_area(fn, l, u)
    # The sample's hull lies inside the true one by at most max|f''| h^2 / 8 of each line, h the sample's spacing; the
    # functions here have |f''| below 40 except near the ends of roots and reciprocals, which a second look allows for.
    # A kink between two sample points costs at most the spacing times the slope's change, here at most 2.
    kink = 2 * (u - l) ** 2 / 800 if fn.breaks else 0.0
    assert (ours <= 1.001 * least + 1e-4 * (u - l) + kink).all(), (ours - least).max()


def test_sin_over_many_periods_is_bounded_by_its_range():
    l, u = torch.tensor([-20.0], dtype=torch.float64), torch.tensor([19.0], dtype=torch.float64)
    k = functions.sin.default_slopes(l, u)
    b = functions.sin.intercepts(k, l, u)
    assert violation(functions.sin, k, b, l, u) <= 1e-12
    assert float(area(functions.sin, l, u)) <= 2 * 39 * (1 + 1e-5)  # the slope is found to 1e-6 of its range


def test_a_point_interval_gives_the_function_itself():
    for fn, low, high in UNARIES.values():
        x = torch.tensor([low + 0.37 * (high - low)], dtype=torch.float64)
        k = fn.default_slopes(x, x)
        b = fn.intercepts(k, x, x)
        assert torch.allclose(k * x + b, fn.f(x).expand(2, 1), atol=1e-9)


@pytest.mark.parametrize(
    ("fn", "l", "u"),
    [
        (functions.reciprocal, -1.0, 1.0),
        (functions.reciprocal, 0.0, 1.0),
        (functions.log, -0.1, 1.0),
        (functions.log, 0.0, 1.0),
        (functions.sqrt, -0.1, 1.0),
        (functions.power(0.5 + 1e-3), -0.1, 1.0),
        (functions.exp, 0.0, 1e6),
        (functions.exp, -math.inf, math.inf),
        (functions.relu, math.nan, 1.0),
        (functions.sigmoid, 1.0, -1.0),
    ],
)
def test_outside_the_domain_the_lines_are_infinite(fn, l, u):
    l, u = torch.tensor([l], dtype=torch.float64), torch.tensor([u], dtype=torch.float64)
    k = fn.default_slopes(l, u)
    b = fn.intercepts(k, l, u)
    assert k.isfinite().all()
    assert not b.isfinite().all()
    assert not (b[0] > -math.inf) or not (b[1] < math.inf)


def test_sqrt_takes_a_bound_that_is_negative_by_rounding_only():
    l, u = torch.tensor([-1e-12], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    k = functions.sqrt.default_slopes(l, u)
    b = functions.sqrt.intercepts(k, l, u)
    assert b.isfinite().all()
    assert violation(functions.sqrt, k, b, l.clamp(min=0), u) <= 1e-12


@pytest.mark.parametrize("name", ["sigmoid", "gelu", "sin", "silu", "relu", "exp"])
def test_gradient_of_the_intercept_is_the_envelope_theorem_s(name):
    fn, low, high = UNARIES[name]
    l, u = intervals(low / 3, high / 3, 40, 5)
    # On a straight piece every point attains the intercept of its own slope: b has a kink there and no derivative.
    wide = (u - l > 0.2) & ~fn.is_line(l, u)
    l, u = l[wide], u[wide]
    assert len(l) > 3
    least, most = fn.slope_range(l, u)
    k = (least + (most - least) * 0.37).expand(2, -1)
    k, l, u = (t.clone().requires_grad_() for t in (k, l, u))
    fn.intercepts(k, l, u).sum().backward()
    h = 1e-6
    for t in (k, l, u):
        with torch.no_grad():
            args = [k, l, u]
            at = next(i for i, s in enumerate(args) if s is t)
            up, down = list(args), list(args)
            up[at], down[at] = t + h, t - h
            difference = (fn.intercepts(*up) - fn.intercepts(*down)) / (2 * h)
            difference = difference if t is k else difference.sum(0)
        # Where the extremum changes place within h the two-sided difference is of another piece: a kink of b.
        close = (t.grad - difference).abs() < 1e-4
        assert close.double().mean() > 0.95


def test_product_planes_are_sound_for_any_mixture():
    generator = torch.Generator().manual_seed(6)
    ends = torch.randn((2, 2, 1, 300), generator=generator, dtype=torch.float64).sort(0).values
    (xl, yl), (xu, yu) = ends[0], ends[1]
    node = Node("mul", Product(), (0, 1), (300,))
    for t in (None, torch.rand((2, 1, 3, 300), dtype=torch.float64)):
        found = lines(node, [(xl, xu), (yl, yu)], None, t)
        for fx in torch.linspace(0, 1, 7, dtype=torch.float64):
            for fy in torch.linspace(0, 1, 7, dtype=torch.float64):
                x, y = xl + fx * (xu - xl), yl + fy * (yu - yl)
                low = found.slopes[0][0] * x + found.slopes[1][0] * y + found.bias[0]
                high = found.slopes[0][1] * x + found.slopes[1][1] * y + found.bias[1]
                assert (low <= x * y + 1e-12).all()
                assert (high >= x * y - 1e-12).all()


def test_a_function_of_the_user_gets_sound_lines():
    mish = unary_relaxation(
        torch.nn.functional.mish,
        lambda x: torch.autograd.functional.jvp(torch.nn.functional.mish, x, torch.ones_like(x))[1],
        (-2.2564020247, 1.4906386366),
        name="mish",
    )
    l, u = intervals(-10, 10, COUNT, 7)
    k = mish.default_slopes(l, u)
    assert violation(mish, k, mish.intercepts(k, l, u), l, u) <= 1e-9
    with pytest.raises(TypeError, match="Unary"):
        register_relaxation("aten.mish", torch.tanh)  # type: ignore[arg-type]


def test_missing_inflections_are_noticed():
    with pytest.raises(ValueError, match="not monotone"):
        unary_relaxation(torch.tanh, lambda x: 1 - torch.tanh(x) ** 2)


@pytest.mark.parametrize(("name", "limit"), [("sigmoid", 0.93), ("tanh", 0.85), ("sin", 0.85), ("gelu", 0.75)])
def test_the_table_cuts_the_area_below_that_of_the_midpoint(name, limit, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    table_of.cache_clear()
    fn = UNARIES[name][0]
    generator = torch.Generator().manual_seed(0)
    ends = 10 * torch.rand((400, 2), generator=generator, dtype=torch.float64) - 5
    ends = ends.sort(1).values
    l, u = ends[ends[:, 1] - ends[:, 0] >= 0.5][:200].T
    p = points((fn,), l, u)
    assert ((p > l) & (p < u)).all()
    middle = (l + u) / 2
    opt, mid = area(fn, l, p) + area(fn, p, u), area(fn, l, middle) + area(fn, middle, u)
    assert float((opt / mid).mean()) <= limit
    stored = list(tmp_path.rglob("*.npy"))
    assert len(stored) == 1
    stored[0].write_bytes(b"damaged")
    table_of.cache_clear()
    assert torch.equal(points((fn,), l, u), p)


def test_outside_the_table_the_midpoint_is_taken():
    l, u = torch.tensor([-7.0, 1.0, -3.0]), torch.tensor([1.0, 1.05, 8.0])
    assert torch.equal(points((functions.tanh,), l.double(), u.double()), ((l + u) / 2).double())


def test_the_table_of_two_functions_is_of_their_sum():
    table = build((functions.relu, functions.relu))
    alone = build((functions.relu,))
    same = torch.isclose(table, alone, equal_nan=True)
    assert same.double().mean() > 0.9
