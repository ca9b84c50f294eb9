# SPDX-License-Identifier: Apache-2.0
"""alpha-CROWN and beta-CROWN: ascent on the free parameters of the lines and on the constraints' multipliers.

Every value of the parameters is sound, so what is kept is the best bound seen, row by row, with its parameters.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.verify.genbab.bounds import (
    Bounds,
    SlopeMap,
    Splits,
    backward,
    bound_nodes,
    initial_t,
    merged,
    settled,
    slope_map,
    slopes_of,
)
from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.region import Region
from tilewright.verify.genbab.unary import Unary

JOINT_ENTRIES = 1 << 23
"""Above this many parameters the intermediate bounds are not optimised."""

Parameters = dict[int, Tensor]


@dataclass(frozen=True)
class Schedule:
    """Adam's settings: steps, learning rates of alpha and beta, and their decay a step."""

    steps: int = 100
    lr_alpha: float = 0.1
    lr_beta: float = 0.05
    decay: float = 0.98


ROOT = Schedule()
BRANCH = Schedule(steps=10, lr_alpha=0.04, lr_beta=0.2, decay=0.9)


@dataclass(eq=False)
class Solution:
    """Best lower bounds [B, S] of the forms, the parameters of that pass, the intervals, and which sets are empty."""

    lower: Tensor
    alphas: Parameters
    bounds: Bounds
    empty: Tensor


def ancestors(graph: Graph, start: int) -> list[int]:
    """Nonlinear nodes that ``start`` depends on, itself included."""
    seen, queue = set(), [start]
    while queue:
        index = queue.pop()
        if index not in seen:
            seen.add(index)
            queue.extend(graph.nodes[index].inputs)
    return sorted(i for i in seen if graph.nodes[i].nonlinear)


def alpha_crown(
    graph: Graph,
    region: Region,
    c: Tensor,
    schedule: Schedule = ROOT,
    *,
    joint: bool = True,
    deadline: float | None = None,
) -> Solution:
    """Lower bounds of c . output (c [B, S, n]) with optimised lines; those of the intermediate bounds too if ``joint``.

    Never below CROWN's. deadline: on time.monotonic(), after which what was found is returned.
    """
    bounds, empty = bound_nodes(graph, region)
    slopes = slopes_of(graph, bounds)
    # Narrower intervals choose other default lines, which need not give a better bound: the first one is kept.
    first = backward(graph, graph.output, c, bounds, region, slopes=slopes)
    final = _start_parameters(graph, graph.output, c.shape[1], region.batch, slopes)
    steps = schedule.steps
    if joint:
        bounds, final = _joint(graph, region, c, bounds, final, slopes, schedule, deadline)
        steps = max(1, steps // 4)
    plain = backward(graph, graph.output, c, bounds, region, slopes=slopes_of(graph, bounds))
    some = Schedule(steps, schedule.lr_alpha, schedule.lr_beta, schedule.decay)
    lower, alphas, _ = ascend(graph, region, bounds, c, final, {}, some, deadline=deadline)
    return Solution(_best(_best(lower, plain), first), alphas, bounds, empty)


def _best(a: Tensor, b: Tensor) -> Tensor:
    """The larger of two sound lower bounds; NaN counts as none."""
    a, b = a.nan_to_num(-torch.inf, torch.inf, -torch.inf), b.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    return torch.maximum(a, b)


def _start_parameters(graph: Graph, start: int, rows: int, batch: int, slopes: dict[int, SlopeMap]) -> Parameters:
    return {
        index: initial_t(slopes.get(index), (batch, rows, graph.nodes[index].size)).to(graph.dtype)
        for index in ancestors(graph, start)
    }


def _joint(
    graph: Graph,
    region: Region,
    c: Tensor,
    bounds: Bounds,
    final: Parameters,
    slopes: dict[int, SlopeMap],
    schedule: Schedule,
    deadline: float | None,
) -> tuple[Bounds, Parameters]:
    """Ascend on all passes' parameters at once; returns the intersection of all intermediate bounds seen."""
    parameters: dict[int, Parameters] = {}
    for start in graph.pre:
        if start == 0 or isinstance(graph.nodes[start].op, Unary) or not ancestors(graph, start):
            continue
        parameters[start] = _start_parameters(graph, start, 2 * graph.nodes[start].size, region.batch, slopes)
    entries = sum(t.numel() for one in parameters.values() for t in one.values())
    if not parameters or entries > JOINT_ENTRIES:
        return bounds, final
    only = frozenset(parameters)
    leaves = [t.requires_grad_() for one in (*parameters.values(), final) for t in one.values()]
    adam = torch.optim.Adam(leaves, lr=schedule.lr_alpha)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, schedule.decay)
    for _ in range(schedule.steps):
        if deadline is not None and time.monotonic() > deadline:
            break
        found, _ = bound_nodes(graph, region, alphas=parameters, only=only)
        maps = {
            i: slope_map(n.op, *found[n.inputs[0]], default=False)
            for i, n in enumerate(graph.nodes)
            if isinstance(n.op, Unary)
        }
        lower = backward(graph, graph.output, c, found, region, alphas=final, slopes=maps)
        with torch.no_grad():
            bounds = {i: settled(*merged(*bounds[i], (l.detach(), u.detach())))[:2] for i, (l, u) in found.items()}
        _step(adam, decay, lower)
        with torch.no_grad():
            for t in leaves:
                t.copy_(t.nan_to_num(0.5).clamp_(0, 1))
    return bounds, {i: t.detach() for i, t in final.items()}


def _step(adam: torch.optim.Adam, decay: torch.optim.lr_scheduler.LRScheduler, lower: Tensor) -> None:
    adam.zero_grad()
    finite = lower.isfinite()
    if finite.any() and lower.requires_grad:
        (-torch.where(finite, lower, torch.zeros_like(lower)).sum()).backward()
        for group in adam.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.nan_to_num_(0.0, 0.0, 0.0)
        adam.step()
        decay.step()


def ascend(
    graph: Graph,
    region: Region,
    bounds: Bounds,
    c: Tensor,
    alphas: Parameters,
    splits: dict[int, Splits],
    schedule: Schedule,
    *,
    slopes: dict[int, SlopeMap] | None = None,
    deadline: float | None = None,
    enough: Tensor | None = None,
) -> tuple[Tensor, Parameters, dict[int, Tensor]]:
    """Best lower bounds [B, S] of c . output with the intervals fixed, and the alphas and betas that gave them.

    enough: [B, S]; the ascent ends when some row of every set exceeds it.
    """
    slopes = slopes_of(graph, bounds) if slopes is None else slopes
    alphas = {i: t.detach().clone().requires_grad_() for i, t in alphas.items()}
    splits = {i: Splits(s.unit, s.sign, s.point, s.beta.detach().clone().requires_grad_()) for i, s in splits.items()}
    betas = {i: s.beta for i, s in splits.items()}
    best = torch.full(c.shape[:2], -torch.inf, dtype=c.dtype)
    kept = {i: t.detach().clone() for i, t in alphas.items()}
    kept_beta = {i: b.detach().clone() for i, b in betas.items()}
    groups = [{"params": list(alphas.values()), "lr": schedule.lr_alpha}]
    if betas:
        groups.append({"params": list(betas.values()), "lr": schedule.lr_beta})
    adam = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, schedule.decay)
    for step in range(schedule.steps + 1):
        lower = backward(graph, graph.output, c, bounds, region, alphas=alphas, slopes=slopes, splits=splits)
        with torch.no_grad():
            better = lower > best
            best = torch.where(better, lower, best)
            for i, t in alphas.items():
                kept[i] = torch.where(better[None, :, :, None], t, kept[i])
            for i, b in betas.items():
                kept_beta[i] = torch.where(better[:, :, None], b, kept_beta[i])
        late = deadline is not None and time.monotonic() > deadline
        done = enough is not None and bool((best > enough).any(1).all())
        if step == schedule.steps or late or done or not (alphas or betas):
            break
        _step(adam, decay, lower)
        with torch.no_grad():
            for t in alphas.values():
                t.clamp_(0, 1)
            for b in betas.values():
                b.clamp_(min=0)
    return best, kept, kept_beta
