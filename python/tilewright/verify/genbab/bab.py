# SPDX-License-Identifier: Apache-2.0
"""Branch and bound over subdomains: worst first, in batches, until nothing is left, a witness shows, or time is up."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tilewright.verify.genbab import attack
from tilewright.verify.genbab.bounds import Bounds, Trace, as_parameters, as_slopes, backward, bound_nodes, slopes_of
from tilewright.verify.genbab.branching import (
    Branching,
    HalfSpace,
    Shortcuts,
    decide,
    half_spaces,
    input_decision,
    shortcuts,
)
from tilewright.verify.genbab.domains import Batch, Domain, stack, unstack
from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.optimise import BRANCH, ROOT, Schedule, Solution, alpha_crown, ascend
from tilewright.verify.genbab.properties import Property
from tilewright.verify.genbab.region import Region

TOLERANCE = 1e-7
SMALLEST_RADIUS = 1e-9


@dataclass(frozen=True)
class Settings:
    """How to search.

    split: "neuron" cuts units before nonlinearities (input axes when none is left, unless the branching names what to
        cut), "input" only input axes.
    refresh: whether intermediate bounds are computed anew in every subdomain, over the part of the box that its cut
        units leave, or stay the root's but for the cut unit and what interval arithmetic makes of it.
    batch_size: subdomains cut a round. max_domains: subdomains bounded in all.
    """

    branching: Branching = field(default_factory=Branching)
    split: str = "neuron"
    timeout: float = 60.0
    batch_size: int = 64
    max_domains: int = 1 << 30
    refresh: bool = True
    tolerance: float = TOLERANCE
    root: Schedule = ROOT
    branch: Schedule = BRANCH
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("neuron", "input"):
            raise ValueError(f"split {self.split!r} is not known; choose neuron or input")
        if not self.timeout > 0 or self.batch_size < 1 or self.max_domains < 0:
            raise ValueError("timeout and batch_size must be positive, max_domains at least 0")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must not be negative")


@dataclass(eq=False)
class Outcome:
    """What a search found.

    lower_bound: of min over clauses of max over rows of c . y + d, over the whole input set. trace: (seconds,
    subdomains bounded, lower bound) after each round.
    """

    status: str
    lower_bound: float
    witness: Tensor | None = None
    domains_visited: int = 0
    reason: str = ""
    trace: list[tuple[float, int, float]] = field(default_factory=list)


class Search:
    """One input set, one property.

    confirm: says whether a point [n_in] violates the property for the model itself. enough: the margin that ends a
    subdomain's work; a function, since a search for a minimum raises it.
    """

    def __init__(
        self,
        graph: Graph,
        region: Region,
        prop: Property,
        settings: Settings,
        confirm: Callable[[Tensor], bool],
        enough: Callable[[], float] | None = None,
    ) -> None:
        self.graph, self.region, self.prop, self.settings = graph, region, prop, settings
        self.confirm = confirm
        self.enough = enough or (lambda: settings.tolerance)
        self.started = time.monotonic()
        self.deadline = self.started + settings.timeout
        self.heap: list[tuple[float, int, Domain]] = []
        self.order = itertools.count()
        self.visited = 0
        self.settled = math.inf
        self.stuck = math.inf
        self.trace: list[tuple[float, int, float]] = []
        self.first: Bounds = {}
        self.short: dict[int, Shortcuts] | None = None
        self.seen: Callable[[Tensor], object] = torch.numel

    # -- root ----------------------------------------------------------------------------------------------------

    def root(self) -> Solution:
        """alpha-CROWN on all rows; the clauses it does not prove become the first subdomains."""
        k, r, n = self.prop.c.shape
        solution = alpha_crown(
            self.graph, self.region, self.prop.c.reshape(1, k * r, n), self.settings.root, deadline=self.deadline
        )
        if bool(solution.empty.any()):
            raise ArithmeticError("the bounds of the whole input set contradict each other; please report this model")
        lower = solution.lower.reshape(k, r) + self.prop.d
        bounds = {i: (solution.bounds[i][0][0], solution.bounds[i][1][0]) for i in self.graph.pre}
        self.first = bounds
        found = as_slopes(solution.alphas, slopes_of(self.graph, solution.bounds))
        for clause in range(k):
            rows = slice(clause * r, (clause + 1) * r)
            alphas = {i: t[:, 0, rows] for i, t in found.items()}
            box = self.region.x_L[0], self.region.x_U[0]
            self._file(Domain(clause, *box, bounds, alphas, lower[clause]))
        self.note()
        return solution

    def adopt(self, other: Search) -> None:
        """Begin where another search of the same problem is."""
        self.first = other.first
        for margin, _, domain in other.heap:
            heapq.heappush(self.heap, (margin, next(self.order), domain))

    def _file(self, domain: Domain) -> None:
        """Keep a subdomain for later, or count it as done; a margin that is NaN is never done."""
        margin = domain.margin
        if margin > self.enough():
            self.settled = min(self.settled, margin)
            return
        heapq.heappush(self.heap, (margin if margin == margin else -math.inf, next(self.order), domain))

    @property
    def lower_bound(self) -> float:
        """Of the whole set: the worst of what is open, stuck and done."""
        return min(self.heap[0][0] if self.heap else math.inf, self.stuck, self.settled)

    def note(self) -> None:
        """Write down where the search is."""
        self.trace.append((time.monotonic() - self.started, self.visited, self.lower_bound))

    # -- rounds --------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Search to the end; the root must have been bounded."""
        while self.heap:
            if self.heap[0][0] > self.enough():
                break
            if time.monotonic() > self.deadline:
                return self._end("unknown", "timeout")
            if self.visited >= self.settings.max_domains:
                return self._end("unknown", f"limit of {self.settings.max_domains} subdomains")
            if self.short is None:
                self.short = self._shortcuts()
            witness = self.round()
            self.note()
            if witness is not None:
                return self._end("falsified", "", witness)
        if self.stuck <= self.enough():
            return self._end("unknown", "a subdomain has nothing left to cut")
        return self._end("verified", "")

    def _end(self, status: str, reason: str, witness: Tensor | None = None) -> Outcome:
        return Outcome(status, self.lower_bound, witness, self.visited, reason, self.trace)

    def _shortcuts(self) -> dict[int, Shortcuts]:
        """Linear bounds of units over the whole set, for the scores of all subdomains."""
        if self.settings.split == "neuron" and self.settings.branching.score == "bbps":
            bounds = {i: (l[None], u[None]) for i, (l, u) in self.first.items()}
            return shortcuts(self.graph, bounds, self.region, slopes_of(self.graph, bounds))
        return {}

    def round(self) -> Tensor | None:
        """Cut a batch of the worst subdomains and bound the halves; a confirmed witness if one shows."""
        count = min(self.settings.batch_size, len(self.heap))
        parents = [heapq.heappop(self.heap)[2] for _ in range(count)]
        batch = stack(self.graph, parents, self.region, self.prop)
        trace = Trace()
        with torch.no_grad():
            slopes = slopes_of(self.graph, batch.bounds)
            backward(
                self.graph,
                self.graph.output,
                batch.c,
                batch.bounds,
                batch.region,
                alphas=as_parameters(batch.alphas, slopes),
                slopes=slopes,
                splits=batch.splits,
                trace=trace,
            )
            witness = self._look(batch, trace)
            if witness is not None:
                for parent in parents:
                    heapq.heappush(self.heap, (parent.margin, next(self.order), parent))
                return witness
            children = self._cut(parents, batch, trace)
        if children:
            self._bound(children)
        return None

    def _look(self, batch: Batch, trace: Trace) -> Tensor | None:
        """Try the corners where the parents' linear bounds are least."""
        assert trace.row is not None
        corners = batch.region.minimiser(trace.row[:, 0].nan_to_num(0.0))
        self.seen(corners)
        bad = self.prop.violated(self.graph.forward(corners)).nonzero().squeeze(-1)
        return next((corners[i] for i in bad.tolist() if self.confirm(corners[i])), None)

    def _cut(self, parents: list[Domain], batch: Batch, trace: Trace) -> list[Domain]:
        children: list[Domain] = []
        axis, middle = input_decision(batch.region, trace)
        by_unit = [[]] * len(parents) if self.settings.split == "input" else self._unit_cuts(parents, batch, trace)
        only = self.settings.split == "neuron" and self.settings.branching.only is not None
        for row, (parent, halves) in enumerate(zip(parents, by_unit, strict=True)):
            # A unit that looks worth cutting may be so again and again and change nothing: an input axis always does.
            if halves and (only or not parent.stalled):
                children += halves
                continue
            radius = 0.0 if only else float((parent.x_U - parent.x_L)[axis[row]]) / 2
            if radius <= SMALLEST_RADIUS:
                self.stuck = min(self.stuck, parent.margin if parent.margin == parent.margin else -math.inf)
                continue
            children += parent.cut_input(int(axis[row]), float(middle[row]))
        return children

    def _unit_cuts(self, parents: list[Domain], batch: Batch, trace: Trace) -> list[list[Domain]]:
        """The halves of each parent by its best decision; none where no unit is left to cut."""
        made = decide(self.graph, batch.bounds, batch.region, trace, self.short or {}, self.settings.branching)
        tried: list[list[list[Domain]]] = [[] for _ in parents]
        for node in made.node.unique().tolist():
            rows, columns = ((made.node == node) & (made.unit >= 0)).nonzero(as_tuple=True)
            units, points = made.unit[rows, columns], made.point[rows, columns]
            inside: list[tuple[HalfSpace | None, HalfSpace | None]] = [(None, None)] * len(rows)
            if node > 0 and self.settings.refresh:
                bounds = {i: (l[rows], u[rows]) for i, (l, u) in batch.bounds.items()}
                inside = half_spaces(self.graph, node, units, points, bounds, batch.region.take(rows))
            for row, unit, point, half in zip(rows.tolist(), units.tolist(), points.tolist(), inside, strict=True):
                parent = parents[row]
                tried[row].append(parent.cut_unit(node, unit, point, half) if node else parent.cut_input(unit, point))
        self._bound_plainly([half for row in tried if len(row) > 1 for halves in row for half in halves])
        return [max(row, key=lambda halves: sorted(h.margin for h in halves), default=[]) for row in tried]

    def _bound_plainly(self, children: list[Domain]) -> None:
        """Bounds of the output with their parent's parameters and the half-spaces, to compare decisions by."""
        for start in range(0, len(children), 2 * self.settings.batch_size):
            some = children[start : start + 2 * self.settings.batch_size]
            batch = stack(self.graph, some, self.region, self.prop)
            bounds, empty = self._intermediate(batch, any(child.fresh for child in some))
            alphas = as_parameters(batch.alphas, slopes_of(self.graph, bounds))
            lower = self._plain(replace(batch, region=batch.cut), bounds, alphas) + batch.d
            lower = torch.where(empty.unsqueeze(-1), torch.inf, lower.nan_to_num(-torch.inf))
            for child, value in zip(some, lower, strict=True):
                child.lower = torch.maximum(child.lower, value)

    def _intermediate(self, batch: Batch, fresh: bool) -> tuple[Bounds, Tensor]:
        """Intervals of the nodes that feed nonlinearities, and which sets are empty."""
        known = {i: interval for i, interval in batch.bounds.items() if i != 0}
        bounds, empty = bound_nodes(self.graph, batch.cut, crown=fresh or self.settings.refresh, known=known)
        return {i: bounds[i] for i in self.graph.pre}, empty

    def _plain(self, batch: Batch, bounds: Bounds, alphas: dict[int, Tensor] | None = None) -> Tensor:
        """Bounds of the rows by one pass."""
        return backward(
            self.graph,
            self.graph.output,
            batch.c,
            bounds,
            batch.region,
            alphas=alphas,
            slopes=slopes_of(self.graph, bounds),
            splits=batch.splits,
        )

    def _bound(self, children: list[Domain]) -> None:
        """Bound new subdomains and file them."""
        for fresh in (False, True):
            some = [child for child in children if child.fresh == fresh]
            for start in range(0, len(some), 2 * self.settings.batch_size):
                self._bound_batch(some[start : start + 2 * self.settings.batch_size], fresh)

    def _bound_batch(self, children: list[Domain], fresh: bool) -> None:
        settings = self.settings
        batch = stack(self.graph, children, self.region, self.prop)
        before = torch.stack([child.lower for child in children])
        with torch.no_grad():
            bounds, empty = self._intermediate(batch, fresh)
            slopes = slopes_of(self.graph, bounds)
            plain = self._plain(batch, bounds)
        enough = self.enough() - batch.d
        lower, alphas, betas = ascend(
            self.graph,
            batch.region,
            bounds,
            batch.c,
            as_parameters(batch.alphas, slopes),
            batch.splits,
            settings.branch,
            slopes=slopes,
            deadline=self.deadline + 1,
            enough=enough,
        )
        lower = torch.where(plain > lower, plain, lower) + batch.d
        lower = torch.where(before > lower, before, lower)
        unstack(children, bounds, as_slopes(alphas, slopes), betas, lower)
        self.visited += len(children)
        for child, gone in zip(children, empty.tolist(), strict=True):
            if not gone:
                self._file(child)


def search(
    graph: Graph, region: Region, prop: Property, settings: Settings, confirm: Callable[[Tensor], bool]
) -> Outcome:
    """Attack, root bounds, branch and bound."""
    x, margin = attack.pgd(graph, region, prop, seed=settings.seed)
    for clause in margin.argsort().tolist():
        if margin[clause] <= 0 and confirm(x[clause]):
            return Outcome("falsified", float(margin[clause]), x[clause])
    found = Search(graph, region, prop, settings, confirm)
    found.root()
    return found.run()


def _no_witness(x: Tensor) -> bool:  # noqa: ARG001
    """A minimum has no witness: nothing ends its search early."""
    return False


def minimum(
    graph: Graph, region: Region, c: Tensor, settings: Settings, *, gap: float = 1e-4
) -> tuple[float, float, Outcome]:
    """Lower and upper bound of min c . output over the set, searched until they are ``gap`` apart or a limit is met.

    The upper bound is the output at a point of the set.
    """
    prop = Property(c.reshape(1, 1, -1).to(graph.dtype), torch.zeros((1, 1), dtype=graph.dtype))
    x, margin = attack.pgd(graph, region, prop, seed=settings.seed)
    best = [float(margin[0])]

    def improve(points: Tensor) -> None:
        value = prop.margins(graph.forward(points))[..., 0]
        value = torch.where(value.isfinite(), value, torch.full_like(value, math.inf))
        best[0] = min(best[0], float(value.min()))

    def polish(point: Tensor) -> None:
        """Descend from a point with steps that shrink to nothing."""
        radius = (region.x_U - region.x_L) / 2
        for step in range(60):
            with torch.enable_grad():
                at = point.detach()[None].requires_grad_()
                (gradient,) = torch.autograd.grad(graph.forward(at) @ prop.c[0, 0], at)
            point = region.project(at.detach() - radius / 8 * 0.8**step * gradient.nan_to_num(0.0).sign())[0]
            improve(point[None])

    found = Search(graph, region, prop, settings, _no_witness, enough=lambda: best[0] - gap)

    def seen(corners: Tensor) -> None:
        improve(corners)
        polish(corners[0])

    found.seen = seen
    polish(x[0])
    found.root()
    outcome = found.run()
    return min(outcome.lower_bound, best[0]), best[0], outcome
