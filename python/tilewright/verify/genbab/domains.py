# SPDX-License-Identifier: Apache-2.0
"""Subdomains of branch and bound: one object each, and their batch as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tilewright.verify.genbab.bounds import Bounds, Splits
from tilewright.verify.genbab.branching import HalfSpace
from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.properties import Property
from tilewright.verify.genbab.region import Region

STALLED = 1e-6
HALF_SPACES, HALF_SPACE_ENTRIES = 4, 256
"""How many of a subdomain's half-spaces its bounds use: this many, or more where they have few entries in all."""


@dataclass(frozen=True, eq=False)
class Constraint:
    """sign (z_unit - point) >= 0 at a node, and its multipliers [R].

    normal [n_in], offset: the half-space normal . x >= offset that follows from it, by linear bounds of the unit.
    """

    node: int
    unit: int
    sign: float
    point: float
    beta: Tensor
    normal: Tensor | None = None
    offset: float = 0.0


@dataclass(eq=False)
class Domain:
    """A part of the input set with what is known about it.

    box: [n_in] ends. bounds: intervals [n] of the nodes that feed nonlinearities. alphas: slopes (of products:
    mixtures) [2, R, n] by node. lower: bounds [R] of its clause's rows, constant included.
    """

    clause: int
    x_L: Tensor
    x_U: Tensor
    bounds: Bounds
    alphas: dict[int, Tensor]
    lower: Tensor
    constraints: tuple[Constraint, ...] = ()
    fresh: bool = False
    """Whether the box was cut, so that intermediate bounds are worth computing anew."""
    inherited: float = -math.inf
    """The margin of the subdomain that it was cut from."""

    @property
    def margin(self) -> float:
        """The clause holds when one of its rows is positive."""
        return float(self.lower.max())

    @property
    def stalled(self) -> bool:
        """Whether the cut that made it lifted its margin by no more than a share STALLED."""
        return self.margin <= self.inherited + STALLED * abs(self.inherited)

    def cut_unit(self, node: int, unit: int, point: float, inside: Sequence[HalfSpace | None]) -> list[Domain]:
        """The halves z <= point and z >= point of a unit; inside: a half-space of the input that holds each of them."""
        halves = []
        for sign, half in zip((-1.0, 1.0), inside, strict=True):
            l, u = self.bounds[node]
            l, u = (l, u.clone()) if sign < 0 else (l.clone(), u)
            (u if sign < 0 else l)[unit] = point
            more = Constraint(node, unit, sign, point, torch.zeros_like(self.lower), *(half or ()))
            bounds = {**self.bounds, node: (l, u)}
            # An earlier cut of the same unit on the same side is implied, and its multiplier only in the way.
            kept = tuple(c for c in self.constraints if (c.node, c.unit, c.sign) != (node, unit, sign))
            made = replace(self, bounds=bounds, constraints=(*kept, more), fresh=False, inherited=self.margin)
            halves.append(made)
        return halves

    def cut_input(self, axis: int, point: float) -> list[Domain]:
        """The halves x <= point and x >= point of an input axis."""
        left, right = self.x_U.clone(), self.x_L.clone()
        left[axis], right[axis] = point, point
        return [
            replace(self, x_L=x_L, x_U=x_U, fresh=True, inherited=self.margin)
            for x_L, x_U in ((self.x_L, left), (right, self.x_U))
        ]


@dataclass(eq=False)
class Batch:
    """Domains stacked: c [B, R, n_out] and d [B, R] of their clauses.

    region: their boxes. cut: the same with the half-spaces of their constraints.
    """

    region: Region
    cut: Region
    bounds: Bounds
    c: Tensor
    d: Tensor
    alphas: dict[int, Tensor]
    splits: dict[int, Splits] = field(default_factory=dict)


def stack(graph: Graph, domains: Sequence[Domain], root: Region, prop: Property) -> Batch:
    """The batch of some domains."""
    region = root.with_box(torch.stack([d.x_L for d in domains]), torch.stack([d.x_U for d in domains]))
    first = domains[0]
    bounds = {
        i: (torch.stack([d.bounds[i][0] for d in domains]), torch.stack([d.bounds[i][1] for d in domains]))
        for i in first.bounds
    }
    alphas = {i: torch.stack([d.alphas[i] for d in domains], dim=1) for i in first.alphas}
    clause = torch.tensor([d.clause for d in domains])
    cut = _with_half_spaces(region, domains)
    return Batch(region, cut, bounds, prop.c[clause], prop.d[clause], alphas, _splits(graph, domains))


def _with_half_spaces(region: Region, domains: Sequence[Domain]) -> Region:
    """The boxes cut with the half-spaces of the domains' latest constraints, latest first."""
    most = max(HALF_SPACES, HALF_SPACE_ENTRIES // region.x_L.shape[1])
    lists = [[c for c in reversed(d.constraints) if c.normal is not None][:most] for d in domains]
    width = max(map(len, lists))
    if not width:
        return region
    normals = torch.zeros((len(domains), width, region.x_L.shape[1]), dtype=region.x_L.dtype)
    offsets = torch.zeros((len(domains), width), dtype=region.x_L.dtype)
    for row, constraints in enumerate(lists):
        for column, one in enumerate(constraints):
            assert one.normal is not None
            normals[row, column], offsets[row, column] = one.normal, one.offset
    return replace(region, normals=normals, offsets=offsets)


def _splits(graph: Graph, domains: Sequence[Domain]) -> dict[int, Splits]:
    grouped: dict[int, list[list[Constraint]]] = {}
    for row, domain in enumerate(domains):
        for one in domain.constraints:
            grouped.setdefault(one.node, [[] for _ in domains])[row].append(one)
    rows = len(domains[0].lower)
    found = {}
    for node, lists in grouped.items():
        width = max(map(len, lists))
        shape = (len(domains), width)
        unit = torch.zeros(shape, dtype=torch.long)
        sign, point = torch.zeros(shape, dtype=graph.dtype), torch.zeros(shape, dtype=graph.dtype)
        beta = torch.zeros((len(domains), rows, width), dtype=graph.dtype)
        for row, constraints in enumerate(lists):
            for column, one in enumerate(constraints):
                unit[row, column], sign[row, column], point[row, column] = one.unit, one.sign, one.point
                beta[row, :, column] = one.beta
        found[node] = Splits(unit, sign, point, beta)
    return found


def unstack(
    domains: Sequence[Domain], bounds: Bounds, alphas: dict[int, Tensor], betas: dict[int, Tensor], lower: Tensor
) -> None:
    """Write a batch's results back into its domains."""
    for row, domain in enumerate(domains):
        domain.bounds = {i: (bounds[i][0][row], bounds[i][1][row]) for i in domain.bounds}
        domain.alphas = {i: t[:, row] for i, t in alphas.items()}
        domain.lower = lower[row]
        column: dict[int, int] = {}
        renewed = []
        for one in domain.constraints:
            at = column.get(one.node, 0)
            column[one.node] = at + 1
            renewed.append(replace(one, beta=betas[one.node][row, :, at]))
        domain.constraints = tuple(renewed)
