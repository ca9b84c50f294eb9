# SPDX-License-Identifier: Apache-2.0
"""ActivationMap against its equation, at several strengths and in the dtypes of activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.capture import ActivationMap, attach

WIDTH = 5


def one(strength: float = 1.0, **options) -> ActivationMap:
    random = torch.Generator().manual_seed(2)
    return ActivationMap(
        torch.randn(WIDTH, generator=random), torch.randn(WIDTH, generator=random), strength, **options
    )


def inputs(dtype=torch.float32):
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("strength", [-0.5, 0.25, 1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_its_equation(strength, dtype):
    change, x = one(strength), inputs(dtype)
    y = change(x)
    exact = (1 + strength * (change.weight.double() - 1)) * x.double() + strength * change.bias.double()
    # four roundings in float32 (float64), one more to the activation's dtype; terms no larger than this
    size = (1 + abs(strength) * (change.weight.double().abs() + 1)) * x.double().abs() + change.bias.double().abs() * 2
    unit = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}[dtype]
    assert y.dtype == dtype
    assert bool(((y.double() - exact).abs() <= 5 * unit * size).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strength_zero_is_the_same_tensor(dtype):
    x = inputs(dtype)
    x[0, 0, 0] = -0.0
    assert one(0.0)(x) is x


def test_inverse_undoes_and_then_composes():
    x = inputs(torch.float64)
    change = ActivationMap(torch.tensor([2.0, -0.5, 1.0, 4.0, 0.25]).double(), torch.arange(5.0).double(), 0.5)
    assert torch.allclose(change.inverse()(change(x)), x, rtol=1e-12)
    other = ActivationMap(torch.rand(5).double() + 0.5, torch.rand(5).double())
    assert torch.allclose(change.then(other)(x), other(change(x)), rtol=1e-12)
    assert torch.allclose(change.at(0.5)(x), ActivationMap(change.weight, change.bias, 0.25)(x))


def test_inverse_holds_small_factors():
    change = ActivationMap(torch.tensor([0.0, -1e-4, 5.0]), torch.zeros(3))
    assert change.inverse().weight.tolist() == [pytest.approx(1000), pytest.approx(-1000), pytest.approx(0.2)]
    with pytest.raises(ValueError, match="least = 0"):
        change.inverse(0)


def test_a_range_leaves_the_rest_alone():
    change = one(low=torch.full((WIDTH,), -0.5), high=torch.full((WIDTH,), 0.5))
    x = inputs()
    inside = x.abs() <= 0.5
    y = change(x)
    assert torch.equal(y[~inside], x[~inside])
    assert torch.equal(y[inside], one()(x)[inside])
    for use in (change.affine, change.inverse, lambda: change.then(one())):
        with pytest.raises(ValueError, match="is not affine"):
            use()


def test_attach_stays_until_it_is_removed():
    net = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh())
    x = torch.randn(3, 4)
    plain = net(x)
    remove = attach(net, {"0": one()})
    assert torch.equal(net[0](x), one()(nn.functional.linear(x, net[0].weight, net[0].bias)))
    assert not torch.equal(net(x), plain)
    remove()
    assert torch.equal(net(x), plain)


def test_a_wrong_name_attaches_nothing():
    net = nn.Sequential(nn.Linear(4, WIDTH))
    with pytest.raises(ValueError, match="matches no module"):
        attach(net, {"0": one(), "nowhere": one()})
    assert not net[0]._forward_hooks


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ActivationMap(torch.ones(2, 2), torch.ones(2, 2)), r"weight has shape \[2, 2\]"),
        (lambda: ActivationMap(torch.ones(2), torch.ones(3)), r"bias is torch.float32 \[3\], needed float \[2\]"),
        (lambda: ActivationMap(torch.ones(2), torch.ones(2).long()), "bias is torch.int64"),
        (lambda: ActivationMap(torch.ones(2), torch.full((2,), torch.nan)), "bias holds NaN"),
        (lambda: ActivationMap(torch.ones(2), torch.ones(2), float("inf")), "strength = inf"),
        (lambda: ActivationMap(torch.ones(2), torch.ones(2), low=torch.ones(2)), "give both or neither"),
        (lambda: one()(torch.ones(1, 3)), r"5 coordinates met an activation \[1, 3\]"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
