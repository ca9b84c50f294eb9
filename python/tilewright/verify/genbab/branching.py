# SPDX-License-Identifier: Apache-2.0
"""What to branch on, and where: BBPS (bound propagation with shortcuts), a BaBSR-like score, width; split points.

A decision cuts the interval [l, u] of one unit before a nonlinearity at a point p. The scores estimate by how much the
worse of the two halves lifts the bound; they are estimates, and nothing is ever proved by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.verify.genbab.bounds import Bounds, SlopeMap, Trace, backward, lines, slope_map, slopes_of
from tilewright.verify.genbab.graph import Graph, Product
from tilewright.verify.genbab.region import Region, best_multiplier
from tilewright.verify.genbab.split_table import points as table_points
from tilewright.verify.genbab.unary import Unary

MIN_WIDTH = 1e-4
"""Units of smooth functions narrower than this are left alone."""

SCORE_ENTRIES = 1 << 22

BRANCHING = ("bbps", "babsr", "width")
POINTS = ("opt", "uniform")


@dataclass(eq=False)
class Shortcuts:
    """Linear bounds of a node's units in the input, valid over the whole root set: lower A x + b, upper A x + b."""

    lower: Tensor
    lower_bias: Tensor
    upper: Tensor
    upper_bias: Tensor


HalfSpace = tuple[Tensor, float]
"""(normal [n_in], offset): the points with normal . x >= offset."""


def half_spaces(
    graph: Graph, index: int, units: Tensor, points: Tensor, bounds: Bounds, region: Region
) -> list[tuple[HalfSpace | None, HalfSpace | None]]:
    """For one unit of a node in each set (units, points [B]): half-spaces that hold all x of the set with z <= point,
    and with z >= point.

    By linear bounds of the unit in the input over this set, which are tighter than those of the whole input set. None
    where the unit has no finite bound.
    """
    one = torch.nn.functional.one_hot(units, graph.nodes[index].size).to(graph.dtype)
    trace = Trace()
    backward(graph, index, torch.stack([one, -one], 1), bounds, region, slopes=slopes_of(graph, bounds), trace=trace)
    assert trace.row is not None
    assert trace.bias is not None
    # row . x + bias is below z and below -z.
    normals = -trace.row
    offsets = trace.bias + torch.stack([-points, points], 1)
    finite = (normals.isfinite().all(-1) & offsets.isfinite()).tolist()
    found = []
    for row, known in enumerate(finite):
        below, above = ((normals[row, k], float(offsets[row, k])) if known[k] else None for k in range(2))
        found.append((below, above))
    return found


def shortcuts(graph: Graph, bounds: Bounds, region: Region, slopes: dict[int, SlopeMap]) -> dict[int, Shortcuts]:
    """For each node that feeds a nonlinear one, by one more backward pass at the root (batch 1)."""
    found = {}
    for index in graph.pre:
        eye = torch.eye(graph.nodes[index].size, dtype=graph.dtype)
        trace = Trace()
        backward(graph, index, torch.cat([eye, -eye])[None], bounds, region, slopes=slopes, trace=trace)
        assert trace.row is not None
        assert trace.bias is not None
        n = len(eye)
        row, bias = trace.row[0], trace.bias[0]
        found[index] = Shortcuts(row[:n], bias[:n], -row[n:], -bias[n:])
    return found


@dataclass(frozen=True)
class Branching:
    """How decisions are made.

    score: one of BRANCHING. point: one of POINTS. only: names of the nonlinearities to branch on; None is all.
    tried: how many decisions of the highest score have their halves bounded before one is taken; 1 believes the score.
    """

    score: str = "bbps"
    point: str = "opt"
    only: frozenset[str] | None = None
    tried: int = 1

    def __post_init__(self) -> None:
        if self.score not in BRANCHING:
            raise ValueError(f"branching {self.score!r} is not known; choose from {', '.join(BRANCHING)}")
        if self.point not in POINTS:
            raise ValueError(f"branching_point {self.point!r} is not known; choose from {', '.join(POINTS)}")
        if self.tried < 1:
            raise ValueError(f"tried is {self.tried}; at least one decision must be tried")


def readers(graph: Graph, index: int, only: frozenset[str] | None = None) -> list[tuple[int, int]]:
    """Nonlinear consumers of a node, those named in ``only`` if given."""
    found = []
    for reader, position in graph.consumers[index]:
        op = graph.nodes[reader].op
        assert isinstance(op, (Unary, Product))
        if only is None or op.name in only:
            found.append((reader, position))
    return found


def candidates(graph: Graph, index: int, bounds: Bounds, only: frozenset[str] | None) -> Tensor:
    """Mask [B, n] of units worth cutting: some consumer's lines are not exact on them."""
    l, u = bounds[index]
    mask = torch.zeros_like(l, dtype=torch.bool)
    for reader, position in readers(graph, index, only):
        node = graph.nodes[reader]
        if isinstance(node.op, Unary):
            wide = u - l > (1e-9 if node.op.piecewise_linear else MIN_WIDTH)
            mask |= wide & ~node.op.is_line(l, u)
        else:
            other = bounds[node.inputs[1 - position]]
            mask |= (u - l > MIN_WIDTH) & (other[1] - other[0] > MIN_WIDTH)
    return mask & l.isfinite() & u.isfinite()


def split_points(graph: Graph, index: int, l: Tensor, u: Tensor, how: Branching) -> Tensor:
    """Where to cut the units of a node: a kink inside, 0 for products, the table's point for smooth functions."""
    ops = [graph.nodes[reader].op for reader, _ in readers(graph, index, how.only)]
    smooth = tuple({op for op in ops if isinstance(op, Unary) and not op.piecewise_linear})
    middle = (l + u) / 2
    point = middle
    if how.point == "opt" and smooth:
        point = table_points(smooth, l, u)
    breaks = [0.0] if not smooth and any(isinstance(op, Product) for op in ops) else []
    breaks += [x for op in ops if isinstance(op, Unary) and not smooth for x in op.breaks]
    nearest = torch.full_like(l, math.inf)
    for x in sorted(set(breaks)):
        better = (l < x) & (u > x) & ((x - middle).abs() < (nearest - middle).abs())
        nearest = torch.where(better, torch.full_like(l, x), nearest)
    return torch.where(nearest.isfinite(), nearest, point)


@dataclass(eq=False)
class Decisions:
    """The decisions of each set by falling score [B, tried]: node, unit (-1 where nothing is left), point, score."""

    node: Tensor
    unit: Tensor
    point: Tensor
    score: Tensor


def decide(
    graph: Graph, bounds: Bounds, region: Region, trace: Trace, root: dict[int, Shortcuts], how: Branching
) -> Decisions:
    """The best decisions of each set. trace: of its last pass over the output, whose rows are the clause's."""
    batch = region.batch
    nothing = torch.full((batch, how.tried), -1, dtype=torch.long)
    parts = [
        Decisions(nothing, nothing, nothing.to(graph.dtype), torch.full_like(nothing, -math.inf, dtype=graph.dtype))
    ]
    for index in graph.pre:
        mask = candidates(graph, index, bounds, how.only)
        if not mask.any():
            continue
        l, u = bounds[index]
        point = split_points(graph, index, l, u, how)
        if how.score == "width":
            score = (u - l).expand_as(mask)
        else:
            score = _scores(graph, index, bounds, region, trace, root.get(index), point, how)
        score = torch.where(mask & score.isfinite(), score, torch.full_like(score, -1e300))
        score = torch.where(mask, score, torch.full_like(score, -math.inf))
        value, unit = score.topk(min(how.tried, score.shape[1]), dim=1)
        unit = torch.where(value > -math.inf, unit, torch.full_like(unit, -1))
        at = point.expand_as(score).gather(1, unit.clamp(min=0))
        parts.append(Decisions(torch.full_like(unit, index), unit, at, value))
    score, order = torch.cat([part.score for part in parts], 1).topk(how.tried, dim=1)
    node, unit, point = (
        torch.cat([getattr(part, name) for part in parts], 1).gather(1, order) for name in ("node", "unit", "point")
    )
    return Decisions(node, unit, point, score)


def _scores(
    graph: Graph,
    index: int,
    bounds: Bounds,
    region: Region,
    trace: Trace,
    short: Shortcuts | None,
    point: Tensor,
    how: Branching,
) -> Tensor:
    """Estimated lift [B, n] of the worse half, summed over the clause's rows."""
    l, u = bounds[index]
    old_a, old_b = _reach(graph, index, bounds, trace, (l, u))
    halves = [_reach(graph, index, bounds, trace, half) for half in ((l, point), (point, u))]
    if how.score == "babsr":
        before = _least(old_a, l, u) + old_b
        lifts = [
            _least(a, lo, hi) + b - before for (a, b), (lo, hi) in zip(halves, ((l, point), (point, u)), strict=True)
        ]
    else:
        assert short is not None
        lifts = [
            _lift(region, trace, short, (old_a, old_b), new, sign, point)
            for new, sign in zip(halves, (-1.0, 1.0), strict=True)
        ]
    return torch.minimum(*lifts).sum(1)


def _least(a: Tensor, l: Tensor, u: Tensor) -> Tensor:
    """min of a z over [l, u]: a [B, S, n], l, u [B, n]."""
    return a.clamp(min=0) * l.unsqueeze(1) + a.clamp(max=0) * u.unsqueeze(1)


def _reach(graph: Graph, index: int, bounds: Bounds, trace: Trace, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Coefficient and intercept [B, S, n] that a node's consumers give its units, were its interval ``new``."""
    total_a: Tensor | None = None
    total_b: Tensor | None = None
    for reader, position in graph.consumers[index]:
        if reader not in trace.at:
            continue
        node, a = graph.nodes[reader], trace.at[reader]
        intervals = [new if i == position else bounds[source] for i, source in enumerate(node.inputs)]
        slopes = slope_map(node.op, *new) if isinstance(node.op, Unary) else None
        found = lines(node, intervals, slopes)
        positive, negative = a.clamp(min=0), a.clamp(max=0)
        k, b = found.slopes[position], found.bias
        part_a = positive * k[0] + negative * k[1]
        part_b = positive * b[0] + negative * b[1]
        if isinstance(node.op, Product):
            # The other operand's coefficient changes too; its own interval bounds what that is worth.
            other = found.slopes[1 - position]
            lo, hi = intervals[1 - position]
            part_b = part_b + _least(positive * other[0] + negative * other[1], lo, hi)
        total_a = part_a if total_a is None else total_a + part_a
        total_b = part_b if total_b is None else total_b + part_b
    if total_a is None or total_b is None:
        rows = next(iter(trace.at.values())).shape[1] if trace.at else 1
        zero = torch.zeros((new[0].shape[0], rows, new[0].shape[1]), dtype=graph.dtype)
        return zero, zero
    return total_a, total_b


def _lift(
    region: Region,
    trace: Trace,
    short: Shortcuts,
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    sign: float,
    point: Tensor,
) -> Tensor:
    """Change of the bound when one unit's coefficient and intercept change, pushed to the input by the shortcut; the
    minimum is over the inputs that the unit's new interval leaves, by the same shortcut."""
    row = trace.row
    assert row is not None
    batch, rows, n = old[0].shape
    per_set = max(1, SCORE_ENTRIES // (rows * n * row.shape[-1]))
    normal = short.upper if sign > 0 else -short.lower
    parts = []
    for at in torch.arange(batch).split(per_set):
        coefficient, bias = _through(short, old[0][at], old[1][at])
        changed, changed_bias = _through(short, new[0][at], new[1][at])
        total = row[at].unsqueeze(2) + changed - coefficient
        some = region.take(at)
        before = some.minimum(row[at]).unsqueeze(2)
        offset = point[at] - short.upper_bias if sign > 0 else short.lower_bias - point[at]
        box = (t[:, None, None] for t in (some.x_L, some.x_U))
        beta = best_multiplier(total, normal, offset.unsqueeze(1), *box)
        total = total - beta.unsqueeze(-1) * normal
        after = some.minimum(total.flatten(1, 2)).reshape(len(at), rows, n) + beta * offset.unsqueeze(1)
        parts.append(after - before + changed_bias - bias)
    return torch.cat(parts)


def _through(short: Shortcuts, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Row a z + b of each unit as a row in the input: [B, S, n, n_in] and [B, S, n]."""
    positive, negative = a.clamp(min=0), a.clamp(max=0)
    row = positive.unsqueeze(-1) * short.lower + negative.unsqueeze(-1) * short.upper
    return row, b + positive * short.lower_bias + negative * short.upper_bias


def input_decision(region: Region, trace: Trace) -> tuple[Tensor, Tensor]:
    """The input axis where |coefficient| times radius is largest, and its midpoint: [B] each.

    Near an interior minimum the coefficients vanish though the relaxation is loose: a tenth of the largest is added to
    each, so that no axis stays wide for ever.
    """
    assert trace.row is not None
    radius = (region.x_U - region.x_L) / 2
    weight = trace.row.abs().sum(1).nan_to_num(0.0, 0.0, 0.0)
    score = (weight + 0.1 * weight.amax(1, keepdim=True) + 1e-12) * radius
    axis = score.argmax(1)
    middle = ((region.x_L + region.x_U) / 2).gather(1, axis[:, None])[:, 0]
    return axis, middle
