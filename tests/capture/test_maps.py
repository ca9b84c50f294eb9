# SPDX-License-Identifier: Apache-2.0
"""Interventions of tilewright.capture on a tiny model, against the same arithmetic written by hand."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

import tilewright.capture as package
from tilewright.capture import add, affine, intervened, replace, scale, tapped


class Two(nn.Module):
    """y = second(tanh(first(x))): [B, T, 4] to [B, T, 3]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def inputs(dtype=torch.float32):
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


def vector(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(2))


MAPS = [
    (replace(0.5), lambda h: torch.full_like(h, 0.5)),
    (replace(vector(5)), lambda h: vector(5).expand_as(h)),
    (add(vector(5)), lambda h: h + vector(5)),
    (scale(0.0), torch.zeros_like),
    (scale(vector(5)), lambda h: h * vector(5)),
    (affine(vector(5), vector(5)), lambda h: h * vector(5) + vector(5)),
    (affine(vector(5, 5), vector(5)), lambda h: h @ vector(5, 5).T + vector(5)),
]


@pytest.mark.parametrize("side", ["first", "second@input"])
@pytest.mark.parametrize(("change", "by_hand"), MAPS)
def test_map_is_its_equation(change, by_hand, side):
    net, x = Two(), inputs()
    with torch.no_grad():
        hidden = net.first(x)
        expected = by_hand(hidden).tanh() if side == "first" else by_hand(hidden.tanh())
        with intervened(net, {side: change}):
            got = net(x)
        assert torch.equal(got, net.second(expected))


def test_maps_on_one_point_compose_in_order():
    net, x = Two(), inputs()
    with torch.no_grad(), intervened(net, {"first": scale(2.0), "re:first": add(1.0)}):
        got = net(x)
    with torch.no_grad():
        assert torch.equal(got, net.second((net.first(x) * 2 + 1).tanh()))


@pytest.mark.parametrize("positions", [slice(-1, None), [0, 3]])
def test_positions_leave_other_tokens_their_bits(positions):
    net, x = Two(), inputs()
    with torch.no_grad():
        bare = net(x)
        with intervened(net, {"first": add(vector(5), positions=positions)}):
            got = net(x)
    changed = (got != bare).any(-1).any(0)
    wanted = torch.zeros(6, dtype=torch.bool)
    wanted[positions] = True
    assert torch.equal(changed, wanted)


@pytest.mark.parametrize("change", [change for change, _ in MAPS])
def test_bf16_model_takes_float32_vectors(change):
    net, x = Two().bfloat16(), inputs(torch.bfloat16)
    with torch.no_grad(), intervened(net, {"first": change}):
        assert net(x).dtype == torch.bfloat16


def test_identity_maps_keep_the_bits_of_bf16():
    net, x = Two().bfloat16(), inputs(torch.bfloat16)
    with torch.no_grad():
        bare = net(x)
        for same in (add(0.0), scale(1.0), affine(torch.ones(5)), affine(torch.eye(5))):
            with intervened(net, {"first": same}):
                assert torch.equal(net(x), bare)


def test_gradient_reaches_the_vector():
    net, v = Two(), torch.zeros(5, requires_grad=True)
    with intervened(net, {"first": add(v)}):
        net(inputs()).sum().backward()
    assert v.grad is not None
    assert bool(v.grad.any())


@pytest.mark.parametrize("change", [replace(vector(4)), add(vector(4)), scale(vector(7, 1, 1, 5)), affine(vector(4))])
def test_sizes_that_do_not_fit_are_named(change):
    net = Two()
    with pytest.raises(ValueError, match=r"the activation.*\[2, 6, 5\]"), intervened(net, {"first": change}):
        net(inputs())


def test_affine_weight_must_be_square():
    with pytest.raises(ValueError, match=r"\[C\] or \[C, C\]"):
        affine(torch.ones(2, 3))


def test_position_out_of_range_is_named():
    net = Two()
    change = add(1.0, positions=[9])
    with pytest.raises(ValueError, match="not all among the 6 tokens"), intervened(net, {"first": change}):
        net(inputs())


def test_misspelt_site_of_an_intervention_lists_near_names():
    with pytest.raises(ValueError, match="near names: second"), intervened(Two(), {"secnd": scale(0.0)}):
        pass


def test_tap_after_an_intervention_sees_the_change():
    net, seen = Two(), {}
    with torch.no_grad(), intervened(net, {"first": replace(2.0)}), tapped(net, {"second@input": seen.__setitem__}):
        net(inputs())
    assert torch.equal(seen["second@input"], torch.full((2, 6, 5), 2.0).tanh())


def test_examples_of_the_documentation():
    assert doctest.testmod(package).failed == 0
