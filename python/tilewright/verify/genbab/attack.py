# SPDX-License-Identifier: Apache-2.0
"""Projected gradient descent on a property: looks for an input that violates it."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.properties import Property
from tilewright.verify.genbab.region import Region

RESTARTS = 30
STEPS = 100


def pgd(
    graph: Graph,
    region: Region,
    prop: Property,
    *,
    restarts: int = RESTARTS,
    steps: int = STEPS,
    decay: float = 0.99,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The most violating inputs found, per clause: (x [K, n_in], margin [K]).

    region: one input set. Signed gradient steps of a quarter of the radius, shrinking by ``decay``; restart 0 begins at
    the centre. A margin <= 0 is a violation of that clause. NaN outputs never count as violations.
    """
    generator = torch.Generator().manual_seed(seed)
    k, n = prop.c.shape[0], graph.nodes[0].size
    x = region.sample(restarts * k, generator).reshape(restarts, k, n)
    x[0] = region.project((region.x_L + region.x_U) / 2)
    radius = (region.x_U - region.x_L) / 2
    best = torch.full((k,), torch.inf, dtype=x.dtype)
    best_x = x[0].clone()
    for step in range(steps + 1):
        x = x.detach().requires_grad_()
        margin = _clause_margins(graph, prop, x)
        with torch.no_grad():
            safe = torch.where(margin.isfinite(), margin, torch.full_like(margin, torch.inf))
            value, at = safe.min(0)
            better = value < best
            best = torch.where(better, value, best)
            best_x = torch.where(better[:, None], x[at, torch.arange(k)], best_x)
        if step == steps:
            break
        (gradient,) = torch.autograd.grad(torch.where(margin.isfinite(), margin, 0.0).sum(), x)
        move = radius / 4 * decay**step * gradient.nan_to_num(0.0).sign()
        x = region.project((x - move).detach())
    return best_x.detach(), best


def _clause_margins(graph: Graph, prop: Property, x: Tensor) -> Tensor:
    """Margin of clause k at its own points x [restarts, K, n]: [restarts, K]."""
    y = graph.forward(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)
    return (torch.einsum("krn,skn->skr", prop.c, y) + prop.d).amax(-1)
