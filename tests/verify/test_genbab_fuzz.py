# SPDX-License-Identifier: Apache-2.0
"""2,000 random graphs and boxes: no sampled or attacked output ever leaves a proved bound."""

from __future__ import annotations

import pytest
import torch
from genbab_cases import random_boxes, random_graph

from tilewright.verify.genbab.bab import Search, Settings
from tilewright.verify.genbab.bounds import Splits, backward, bound_nodes, slopes_of
from tilewright.verify.genbab.branching import Branching
from tilewright.verify.genbab.optimise import Schedule, alpha_crown
from tilewright.verify.genbab.properties import Property
from tilewright.verify.genbab.region import Region

GRAPHS, BATCH, SAMPLES = 2000, 2, 40
CHUNKS = 20
SEARCHES = 100
SLACK = 1e-8


def attacked(graph, region, c, x, steps=2):
    """Points moved down each form c [S, n] from the best samples: [S, B, n]."""
    y = graph.forward(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1) @ c.T
    best = y.argmin(0)
    start = x[best.T, torch.arange(x.shape[1])]
    radius = (region.x_U - region.x_L) / 2
    for step in range(steps):
        at = start.detach().requires_grad_()
        value = (graph.forward(at.reshape(-1, x.shape[-1])).reshape(*at.shape[:2], -1) * c[:, None]).sum()
        (gradient,) = torch.autograd.grad(value, at)
        start = region.project(start - radius * 0.5**step * gradient.nan_to_num(0.0).sign())
    return start.detach()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_output_leaves_its_bounds(chunk):
    proved = 0
    for seed in range(chunk, GRAPHS, CHUNKS):
        graph = random_graph(seed)
        region = Region(*random_boxes(seed, BATCH))
        generator = torch.Generator().manual_seed(seed)
        c = torch.cat([torch.eye(2, dtype=torch.float64), -torch.eye(2, dtype=torch.float64)])
        x = region.sample(SAMPLES, generator)
        x[:2] = torch.stack([region.x_L, region.x_U])
        points = torch.cat([x, attacked(graph, region, c, x)])
        values = graph.values(points.reshape(-1, 3))
        forms = (values[-1] @ c.T).reshape(-1, BATCH, 4)
        scale = SLACK * (1 + forms.abs().amax(0))
        rows = c.expand(BATCH, -1, -1)
        ibp = bound_nodes(graph, region, crown=False)[0] if seed % 4 == 0 else {}
        bounds, empty = bound_nodes(graph, region)
        assert not empty.any(), seed
        for found in (ibp, bounds):
            for index, (l, u) in found.items():
                y = values[index].reshape(-1, BATCH, l.shape[1])
                room = SLACK * (1 + y.abs().amax(0))
                assert (y >= l - room).all(), (seed, index)
                assert (y <= u + room).all(), (seed, index)
        slopes = slopes_of(graph, bounds)
        lower = backward(graph, graph.output, rows, bounds, region, slopes=slopes)
        assert not (forms < lower - scale).any(), seed
        proved += int(lower.isfinite().sum())
        constrained(graph, region, bounds, slopes, rows, points, values, forms, generator, seed)
        if seed % 40 == chunk:
            solution = alpha_crown(graph, region, rows, Schedule(steps=3))
            assert not (forms < solution.lower - scale).any(), seed
            assert (solution.lower >= lower.nan_to_num(-torch.inf) - scale).all(), seed
    # A bound that is never finite would pass: most must be.
    assert proved > 0.8 * (GRAPHS / CHUNKS) * BATCH * 4


def constrained(graph, region, bounds, slopes, rows, points, values, forms, generator, seed):
    """With random alphas, a random cut and a random multiplier, samples on the cut's side stay above the bound."""
    if not graph.pre:
        return
    node = graph.pre[int(torch.randint(len(graph.pre), (1,), generator=generator))]
    z = values[node].reshape(-1, BATCH, graph.nodes[node].size)
    unit = int(torch.randint(z.shape[-1], (1,), generator=generator))
    point = z[:, :, unit].median(0).values
    sign = 1.0 if seed % 2 else -1.0
    beta = torch.rand((BATCH, 4, 1), generator=generator, dtype=torch.float64)
    whole = torch.full((BATCH, 1), unit)
    splits = {node: Splits(whole, torch.full((BATCH, 1), sign, dtype=torch.float64), point[:, None], beta)}
    alphas = {
        i: torch.rand((2, BATCH, 4, n.size), generator=generator, dtype=torch.float64)
        for i, n in enumerate(graph.nodes)
        if n.nonlinear
    }
    lower = backward(graph, graph.output, rows, bounds, region, slopes=slopes, alphas=alphas, splits=splits)
    on_side = (sign * (z[:, :, unit] - point) >= 0)[:, :, None]
    room = SLACK * (1 + forms.abs().amax(0))
    assert not (on_side & (forms < lower - room)).any(), seed


@pytest.mark.parametrize("chunk", range(4))
def test_no_output_leaves_the_bound_of_its_subdomain(chunk):
    # Whole searches: cut units, their half-spaces, refreshed intervals, multipliers.
    cuts = 0
    for seed in range(chunk, SEARCHES, 4):
        graph = random_graph(10_000 + seed)
        low, high = random_boxes(10_000 + seed, 2)
        region = Region(low[1:], high[1:])
        c = torch.tensor([[[1.0, -0.5]]], dtype=torch.float64)
        prop = Property(c, torch.zeros((1, 1), dtype=torch.float64))
        how = Branching(("bbps", "babsr", "width")[seed % 3], ("opt", "uniform")[seed % 2], tried=1 + seed // 2 % 3)
        settings = Settings(how, batch_size=4, max_domains=14, root=Schedule(3), branch=Schedule(3))
        search = Search(graph, region, prop, settings, lambda x: False, lambda: 1e300)  # noqa: ARG005
        search.root()
        search.run()
        x = region.sample(300, torch.Generator().manual_seed(seed))[:, 0]
        values = graph.values(x)
        y = (values[-1] @ c[0, 0]).reshape(-1)
        covered = torch.zeros(len(x), dtype=torch.bool)
        for _, _, domain in search.heap:
            inside = ((x >= domain.x_L) & (x <= domain.x_U)).all(1)
            for one in domain.constraints:
                inside &= one.sign * (values[one.node][:, one.unit] - one.point) >= 0
                cuts += 1
            covered |= inside
            room = SLACK * (1 + y.abs())
            assert not (inside & (y < domain.lower[0] - room)).any(), seed
            for node, (l, u) in domain.bounds.items():
                z = values[node][inside]
                assert not ((z < l - SLACK * (1 + z.abs())) | (z > u + SLACK * (1 + z.abs()))).any(), seed
        assert search.stuck < torch.inf or covered.all(), seed
    assert cuts > SEARCHES
