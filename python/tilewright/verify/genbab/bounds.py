# SPDX-License-Identifier: Apache-2.0
"""Interval arithmetic and backward linear bound propagation (CROWN), batched over input sets.

One backward pass bounds S linear forms c . z of a node from below; an upper bound is the lower bound of -c . z. Every
pass uses one line per unit and side, whose free parameters t in [0, 1] ("alpha": the slope between the function's
smallest and largest, or the weight between a product's two planes) may be optimised: all values are sound.

Shapes: B input sets, S forms, n units. Coefficients [B, S, n], values [B, S].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilewright.verify.genbab.affine import Dense
from tilewright.verify.genbab.graph import Graph, Interval, Node, Product
from tilewright.verify.genbab.region import Region
from tilewright.verify.genbab.unary import Unary

Bounds = dict[int, Interval]
"""Intervals [B, n] of nodes, by index."""

Alphas = Mapping[int, Tensor]
"""Parameters t [2, B, S, n] of one pass, by nonlinear node."""

EMPTY_SLACK = 1e-9
ROW_ENTRIES = 1 << 24
"""Backward passes are cut into pieces of about this many coefficients."""


@dataclass(eq=False)
class Lines:
    """Two-sided linear bounds of a nonlinear node: coefficients [2, B, S or 1, n] by argument, intercepts."""

    slopes: list[Tensor]
    bias: Tensor


@dataclass(eq=False)
class Splits:
    """Constraints sign (z_unit - point) >= 0 on units of one node, K a set: [B, K] each; sign 0 is none.

    beta [B, S, K] >= 0 are their multipliers.
    """

    unit: Tensor
    sign: Tensor
    point: Tensor
    beta: Tensor


@dataclass(eq=False)
class Trace:
    """What a backward pass leaves behind: coefficients at the outputs of nonlinear nodes and at the input."""

    at: dict[int, Tensor] = field(default_factory=dict)
    row: Tensor | None = None
    bias: Tensor | None = None


@dataclass(eq=False)
class SlopeMap:
    """The slopes low + width t of a unary node; width 0 where the chord is the only one worth having.

    default: the slopes of least area, None when nobody asked. All [2, B, 1, n].
    """

    low: Tensor
    width: Tensor
    default: Tensor | None


def slope_map(fn: Unary, low: Tensor, high: Tensor, *, default: bool = True) -> SlopeMap:
    """The slope map of a function on intervals [B, n]."""
    l, u = low.detach().unsqueeze(1), high.detach().unsqueeze(1)
    least, most = fn.slope_range(l, u)
    free = fn.free_sides(l, u) & (most > least) & least.isfinite() & most.isfinite()
    base = torch.where(free, least, fn.chord_slopes(l, u))
    return SlopeMap(
        base, torch.where(free, most - least, torch.zeros_like(base)), fn.default_slopes(l, u) if default else None
    )


def lines(node: Node, intervals: list[Interval], slopes: SlopeMap | None, t: Tensor | None = None) -> Lines:
    """Linear bounds of a nonlinear node on its arguments' intervals [B, n]; t [2, B, S, n], None: default lines."""
    if isinstance(node.op, Product):
        return _product_lines(intervals, t)
    assert isinstance(node.op, Unary)
    assert slopes is not None
    k = slopes.default if t is None else slopes.low + slopes.width * t
    assert k is not None
    l, u = (x.unsqueeze(1) for x in intervals[0])
    return Lines([k], node.op.intercepts(k, l, u))


def initial_t(slopes: SlopeMap | None, shape: tuple[int, ...]) -> Tensor:
    """The parameters [2, *shape] of the default lines: the default slope, or a product's first plane."""
    if slopes is None:
        return torch.ones((2, *shape), dtype=torch.float64)
    assert slopes.default is not None
    t = (slopes.default - slopes.low) / torch.where(slopes.width > 0, slopes.width, torch.ones_like(slopes.width))
    return t.nan_to_num(0.5, 1.0, 0.0).clamp(0, 1).expand(2, *shape).clone()


def _product_lines(intervals: list[Interval], t: Tensor | None) -> Lines:
    """McCormick's planes: yl x + xl y - xl yl and yu x + xu y - xu yu below, yu x + xl y - xl yu and
    yl x + xu y - xu yl above; t mixes the two, 1 being the first."""
    (xl, xu), (yl, yu) = ((lo.unsqueeze(1), hi.unsqueeze(1)) for lo, hi in intervals)
    first = (torch.stack([yl, yu]), torch.stack([xl, xl]), torch.stack([-xl * yl, -xl * yu]))
    if t is None:
        a, b, c = first
    else:
        second = (torch.stack([yu, yl]), torch.stack([xu, xu]), torch.stack([-xu * yu, -xu * yl]))
        a, b, c = (t * p + (1 - t) * q for p, q in zip(first, second, strict=True))
    eps = 4 * torch.finfo(xl.dtype).eps
    reach_x, reach_y = torch.maximum(xl.abs(), xu.abs()), torch.maximum(yl.abs(), yu.abs())
    slack = eps * (3 * reach_x * reach_y + 1)
    side = xl.new_tensor([1.0, -1.0]).view(2, 1, 1, 1)
    return Lines([a, b], c - side * slack)


def interval(node: Node, xs: list[Interval]) -> Interval:
    """Interval arithmetic of one node; what cannot be computed becomes infinite."""
    if isinstance(node.op, Unary):
        low, high = node.op.values(*xs[0])
    elif isinstance(node.op, Product):
        (xl, xu), (yl, yu) = xs
        corners = torch.stack([xl * yl, xl * yu, xu * yl, xu * yu])
        low, high = corners.amin(0), corners.amax(0)
    else:
        assert node.op is not None
        middle = node.op.apply([(lo + hi) / 2 for lo, hi in xs])
        radius = node.op.radius([(hi - lo) / 2 for lo, hi in xs])
        low, high = middle - radius, middle + radius
    inf = torch.full_like(low, torch.inf)
    return torch.where(low.isnan(), -inf, low), torch.where(high.isnan(), inf, high)


def backward(
    graph: Graph,
    start: int,
    c: Tensor,
    bounds: Bounds,
    region: Region,
    *,
    alphas: Alphas | None = None,
    slopes: Mapping[int, SlopeMap],
    splits: Mapping[int, Splits] | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Lower bounds [B, S] of c . z over the sets, for coefficients c [B, S, n] of node ``start``.

    slopes: by unary node. alphas: parameters of the lines by node (defaults elsewhere). splits: constraints with
    multipliers, by node. trace: filled when given.
    """
    pending: dict[int, Tensor] = {start: c}
    bias = torch.zeros(c.shape[:2], dtype=c.dtype)
    for index in range(start, 0, -1):
        if index not in pending:
            continue
        a, node = pending.pop(index), graph.nodes[index]
        if splits and index in splits:
            a, bias = _constrained(a, bias, splits[index])
        if isinstance(node.op, (Unary, Product)):
            if trace is not None:
                trace.at[index] = a
            found = lines(
                node,
                [bounds[i] for i in node.inputs],
                slopes.get(index),
                None if alphas is None else alphas.get(index),
            )
            positive, negative = a.clamp(min=0), a.clamp(max=0)
            parts = [positive * k[0] + negative * k[1] for k in found.slopes]
            bias = bias + _weighted(positive, found.bias[0]) + _weighted(negative, found.bias[1])
        else:
            assert node.op is not None
            parts = node.op.transpose(a)
            bias = bias + a @ node.op.bias
        for source, part in zip(node.inputs, parts, strict=True):
            pending[source] = pending[source] + part if source in pending else part
    row = pending.get(0, torch.zeros((*c.shape[:2], graph.nodes[0].size), dtype=c.dtype))
    if splits and 0 in splits:
        row, bias = _constrained(row, bias, splits[0])
    if trace is not None:
        trace.row, trace.bias = row, bias
    return region.minimum(row) + bias


def _weighted(a: Tensor, b: Tensor) -> Tensor:
    """sum_n a b where a is not 0: an infinite intercept that nothing uses does no harm."""
    product = a * b
    return torch.where(a == 0, torch.zeros_like(product), product).sum(-1) if b.isinf().any() else product.sum(-1)


def _constrained(a: Tensor, bias: Tensor, s: Splits) -> tuple[Tensor, Tensor]:
    """The Lagrangian's terms: coefficients minus beta sign, bias plus beta sign point."""
    push = s.beta * s.sign.unsqueeze(1)
    unit = s.unit.unsqueeze(1).expand_as(push)
    return a.scatter_add(-1, unit, -push), bias + (push * s.point.unsqueeze(1)).sum(-1)


def merged(low: Tensor, high: Tensor, other: Interval) -> Interval:
    """Intersection of two intervals; a NaN on one side leaves the other's word."""
    l, u = other
    l, u = l.expand_as(low), u.expand_as(high)
    low = torch.where(l.isnan() | (low > l), low, l)
    high = torch.where(u.isnan() | (high < u), high, u)
    return low, high


def settled(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intervals with low <= high, and which sets [B] are empty: low beyond high by more than rounding explains."""
    scale = 1 + low.abs().nan_to_num(posinf=0) + high.abs().nan_to_num(posinf=0)
    crossed = low > high
    empty = (low - high > EMPTY_SLACK * scale).any(-1)
    middle = (low + high) / 2
    return torch.where(crossed, middle, low), torch.where(crossed, middle, high), empty


def bound_nodes(
    graph: Graph,
    region: Region,
    *,
    crown: bool = True,
    alphas: Mapping[int, Alphas] | None = None,
    known: Bounds | None = None,
    upto: int | None = None,
    only: frozenset[int] | None = None,
) -> tuple[Bounds, Tensor]:
    """Intervals of all nodes in order, and which sets are empty [B].

    crown: whether nodes that feed a nonlinear one get a backward pass (only those in ``only`` if given). alphas:
    parameters by start node. known: intervals to intersect with. upto: the last node wanted.
    """
    bounds: Bounds = {0: (region.x_L, region.x_U)}
    empty = torch.zeros(region.batch, dtype=torch.bool)
    if known and 0 in known:
        low, high, bad = settled(*merged(*bounds[0], known[0]))
        bounds[0], empty = (low, high), empty | bad
    slopes: dict[int, SlopeMap] = {}
    for index, node in enumerate(graph.nodes[: (graph.output if upto is None else upto) + 1]):
        if index == 0:
            _prepare(graph, 0, *bounds[0], slopes, crown, alphas is None)
            continue
        low, high = interval(node, [bounds[i] for i in node.inputs])
        if node.hull is not None:
            low, high = merged(low, high, node.hull(*(bounds[i] for i in node.hull_of)))
        if known and index in known:
            low, high = merged(low, high, known[index])
        exact = isinstance(node.op, Dense) and node.inputs == (0,) and region.norm is None
        wanted = graph.consumers[index] and (only is None or index in only)
        if crown and wanted and not exact and not isinstance(node.op, Unary):
            low, high = merged(low, high, _both_sides(graph, index, low, high, bounds, region, alphas, slopes))
        low, high, bad = settled(low, high)
        bounds[index], empty = (low, high), empty | bad
        _prepare(graph, index, low, high, slopes, crown, alphas is None)
    return bounds, empty


def _prepare(
    graph: Graph, index: int, low: Tensor, high: Tensor, slopes: dict[int, SlopeMap], crown: bool, default: bool
) -> None:
    """Slope maps of the unary nodes that read a node, if backward passes will ask for them."""
    for reader, _ in graph.consumers[index]:
        op = graph.nodes[reader].op
        if crown and isinstance(op, Unary):
            slopes[reader] = slope_map(op, low, high, default=default)


def _both_sides(
    graph: Graph,
    index: int,
    low: Tensor,
    high: Tensor,
    bounds: Bounds,
    region: Region,
    alphas: Mapping[int, Alphas] | None,
    slopes: Mapping[int, SlopeMap],
) -> Interval:
    """Backward bounds of the units of a node that need them, the others as they were."""
    n = graph.nodes[index].size
    units = needed_units(graph, index, low.detach(), high.detach()) if alphas is None else torch.arange(n)
    if not len(units):
        return low, high
    eye = torch.zeros((2 * len(units), n), dtype=low.dtype)
    eye[torch.arange(len(units)), units] = 1
    eye[len(units) + torch.arange(len(units)), units] = -1
    mine = None if alphas is None else alphas.get(index)
    widest = max(node.size for node in graph.nodes[: index + 1])
    rows = max(1, ROW_ENTRIES // (widest * region.batch)) if mine is None else len(eye)
    found = torch.cat(
        [
            backward(graph, index, part.expand(region.batch, -1, -1), bounds, region, alphas=mine, slopes=slopes)
            for part in eye.split(rows)
        ],
        dim=1,
    )
    lower, upper = found[:, : len(units)], -found[:, len(units) :]
    if len(units) == n:
        return lower, upper
    return low.index_copy(1, units, lower), high.index_copy(1, units, upper)


def needed_units(graph: Graph, index: int, low: Tensor, high: Tensor) -> Tensor:
    """Units whose bounds matter: some consumer is no line on them in some set."""
    wanted = torch.zeros(low.shape[1], dtype=torch.bool)
    for reader, _ in graph.consumers[index]:
        op = graph.nodes[reader].op
        wanted |= ~op.is_line(low, high).all(0) if isinstance(op, Unary) else torch.ones_like(wanted)
    return wanted.nonzero().squeeze(-1)


def slopes_of(graph: Graph, bounds: Bounds) -> dict[int, SlopeMap]:
    """Slope maps, with defaults, of every unary node."""
    return {
        index: slope_map(node.op, *bounds[node.inputs[0]])
        for index, node in enumerate(graph.nodes)
        if isinstance(node.op, Unary)
    }


def as_slopes(alphas: Alphas, slopes: Mapping[int, SlopeMap]) -> dict[int, Tensor]:
    """The slopes that parameters mean; a product's mixture stays what it is."""
    return {i: slopes[i].low + slopes[i].width * t if i in slopes else t for i, t in alphas.items()}


def as_parameters(found: Mapping[int, Tensor], slopes: Mapping[int, SlopeMap]) -> dict[int, Tensor]:
    """The parameters in [0, 1] of given slopes, as near as the intervals' range of slopes reaches."""
    out = {}
    for i, k in found.items():
        if i in slopes:
            width = torch.where(slopes[i].width > 0, slopes[i].width, torch.ones_like(slopes[i].width))
            k = ((k - slopes[i].low) / width).nan_to_num(0.5).clamp(0, 1)
        out[i] = k
    return out
