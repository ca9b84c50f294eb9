# SPDX-License-Identifier: Apache-2.0
"""Closed-form methods against their equations in numpy, on activations that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from steer_models import one_place, source, target, tiny_llama

from tilewright.steer import steer
from tilewright.steer.lineas import distributional_losses
from tilewright.steer.problem import Problem


def samples(n=14, m=9):
    random = torch.Generator().manual_seed(4)
    return torch.randn(n, 6, generator=random) * 2 + 1, torch.randn(m, 6, generator=random) * 0.5 - 2


def learned(method, z, v, **options):
    model, texts, wanted = one_place(z, v)
    return steer(model, method, source=texts, target=wanted, modules="place", **options).maps["place"]


def same(got, wanted):
    assert torch.allclose(got.double(), torch.as_tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["diffmean", "mean_act"])
def test_mean_shift(method):
    z, v = samples()
    one = learned(method, z, v)
    same(one.weight, np.ones(6))
    same(one.bias, v.double().numpy().mean(0) - z.double().numpy().mean(0))


def test_gaussian_act():
    z, v = samples()
    one = learned("gaussian_act", z, v)
    w = v.double().numpy().std(0) / z.double().numpy().std(0)
    same(one.weight, w)
    same(one.bias, v.double().numpy().mean(0) - w * z.double().numpy().mean(0))


@pytest.mark.parametrize("sizes", [(14, 14), (14, 7), (9, 6)])
def test_lin_act_is_least_squares_on_sorted_samples(sizes):
    z, v = samples(*sizes)
    one = learned("lin_act", z, v)
    # With sizes that divide a common number, repeated samples are the exact coupling.
    common = np.lcm(*sizes)
    for j in range(6):
        x = np.repeat(np.sort(z[:, j].double().numpy()), common // sizes[0])
        y = np.repeat(np.sort(v[:, j].double().numpy()), common // sizes[1])
        w, b = np.polyfit(x, y, 1)
        assert float(one.weight[j]) == pytest.approx(w, rel=1e-4)
        assert float(one.bias[j]) == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_coordinates_without_spread_are_shifted():
    z, v = samples()
    z[:, 2] = 3.7
    for method in ("lin_act", "gaussian_act"):
        one = learned(method, z, v)
        assert torch.isfinite(one.weight).all()
        assert float(one(z)[0, 2]) == pytest.approx(float(v[:, 2].mean()), abs=2e-2)
    assert float(learned("lin_act", z, v).weight[2]) == 1.0


def test_lin_act_leaves_what_lies_outside_the_source_alone():
    z, v = samples()
    one = learned("lin_act", z, v, support="range")
    far = torch.full((1, 6), 99.0)
    assert torch.equal(one(far), far)
    assert torch.equal(one(z), learned("lin_act", z, v)(z))
    with pytest.raises(ValueError, match="support = 'some'"):
        learned("lin_act", z, v, support="some")


def test_iti_c_is_a_direction_towards_the_target():
    z, v = samples(30, 30)
    z[:, 3:], v[:, 3:] = 0.1 * z[:, 3:], 0.1 * z[:, 3:].flip(0)
    one = learned("iti_c", z, v)
    same(one.weight, np.ones(6))
    both = torch.cat([z, v]).double()
    normal = one.bias.double() / one.bias.double().norm()
    assert float(one.bias.double().norm()) == pytest.approx(float((both @ normal).std(unbiased=False)), rel=1e-4)
    assert float((v.double() @ normal).mean()) > float((z.double() @ normal).mean())


def test_aura_dampens_what_tells_source_from_target():
    z = torch.tensor([[5.0, 0.0, 1.0], [6.0, 1.0, 1.0], [7.0, 2.0, 1.0]])
    v = torch.tensor([[1.0, 5.0, 1.0], [6.0, 6.0, 1.0]])
    one = learned("aura", z, v)
    # AUROC by hand: (5 > 1, 6 > 1, 6 = 6, 7 > 1, 7 > 6) = 4.5 of 6; none of 6; all ties.
    same(one.weight, [2 * (1 - 4.5 / 6), 1.0, 1.0])
    same(one.bias, np.zeros(3))


def test_sequential_maps_are_fitted_to_steered_activations():
    model = tiny_llama()
    problem = Problem.of(model, source(10), target(10))
    wanted = problem.pooled(problem.target)
    maps = steer(model, "mean_act", source=source(10), target=target(10))
    with maps.transform(model):
        steered = problem.pooled(problem.source)
    for name, x in steered.items():
        # Each map was fitted behind the maps before it, so that with all of them the means meet everywhere.
        assert torch.allclose(x.mean(0), wanted[name].mean(0), atol=1e-4)
    once = steer(model, "mean_act", source=source(10), target=target(10), sequential=False)
    with once.transform(model):
        apart = problem.pooled(problem.source)
    last = list(wanted)[-1]
    assert not torch.allclose(apart[last].mean(0), wanted[last].mean(0), atol=1e-2)


def test_lin_act_meets_the_target_better_than_mean_shift():
    z, v = samples(20, 20)
    losses = [
        float(distributional_losses({"p": learned(name, z, v)(z)}, {"p": v})["p"])
        for name in ("lin_act", "gaussian_act", "mean_act")
    ]
    assert losses == sorted(losses)
