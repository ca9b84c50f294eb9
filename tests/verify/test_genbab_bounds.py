# SPDX-License-Identifier: Apache-2.0
"""Bounds of torch modules: against samples and attacks, in order of strength, in auto_LiRPA's spelling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tilewright.verify import BoundedModule, BoundedTensor, PerturbationLpNorm, UnboundedError, UnsupportedOperator
from tilewright.verify.genbab import register_relaxation, unary_relaxation
from tilewright.verify.genbab._claim_models import Net, graphs
from tilewright.verify.genbab.bounds import Splits, backward
from tilewright.verify.genbab.build import Builder
from tilewright.verify.genbab.functions import REGISTERED
from tilewright.verify.genbab.region import Region

KINDS = graphs(0)


def box(n, radius=0.2, batch=2, seed=1):
    x = torch.randn((batch, n), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return BoundedTensor(x, PerturbationLpNorm(eps=radius))


def samples(bounded, count=2000):
    t = torch.rand((count, *bounded.data.shape), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return bounded.data + (2 * t - 1) * bounded.ptb.eps


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_of_every_kind_contain_the_module_s_outputs_and_get_tighter(kind):
    module, n = KINDS[kind]
    bounded = BoundedModule(module, torch.zeros(1, n), {"optimize_bound_args": {"iteration": 5}})
    x = box(n)
    with torch.no_grad():
        y = module(samples(x).reshape(-1, n)).reshape(-1, 2, bounded.graph.nodes[-1].size)
    widths = {}
    for method in ("IBP", "CROWN-IBP", "CROWN", "alpha-CROWN"):
        lower, upper = bounded.compute_bounds(x=(x,), method=method)
        room = 1e-8 * (1 + y.abs().amax(0))
        assert (y >= lower - room).all()
        assert (y <= upper + room).all()
        widths[method] = upper - lower
    assert (widths["alpha-CROWN"] <= widths["CROWN"] * (1 + 1e-9) + 1e-12).all()
    assert widths["CROWN"].mean() <= widths["IBP"].mean() * (1 + 1e-9)


def test_the_recorded_graph_computes_what_the_module_does():
    for module, n in KINDS.values():
        x = torch.randn((3, n), dtype=torch.float64)
        assert torch.allclose(BoundedModule(module, x)(x), module(x), atol=1e-12)


def test_multipliers_peak_where_they_should():
    # f(x) = x on [-1, 1] with x >= 0.3 by the multiplier alone: the bound is -1 + 1.3 beta up to beta = 1, then falls.
    b = Builder((1, 1))
    graph = b.graph(b.input)
    region = Region(*(torch.tensor([[v]], dtype=torch.float64) for v in (-1.0, 1.0)))
    found = []
    for beta in (0.0, 0.5, 1.0, 1.5):
        cut = [torch.tensor([[v]], dtype=torch.float64) for v in (1.0, 0.3)]
        splits = {0: Splits(torch.zeros((1, 1), dtype=torch.long), *cut, torch.full((1, 1, 1), beta).double())}
        row = torch.ones((1, 1, 1), dtype=torch.float64)
        found.append(float(backward(graph, 1, row, {0: (region.x_L, region.x_U)}, region, slopes={}, splits=splits)))
    assert found == pytest.approx([-1.0, -0.35, 0.3, -0.05])


def test_specification_and_sides():
    module = Net((4, 8, 3), torch.tanh, 0)
    bounded, x = BoundedModule(module, torch.zeros(1, 4)), box(4)
    C = torch.randn((2, 5, 3), dtype=torch.float64)
    lower, upper = bounded.compute_bounds(x=(x,), C=C, method="CROWN")
    assert lower.shape == upper.shape == (2, 5)
    minus, none = bounded.compute_bounds(x=(x,), C=-C, method="CROWN", bound_upper=False)
    assert none is None
    assert torch.allclose(minus, -upper, atol=1e-9)
    y = torch.einsum("bsn,kbn->kbs", C, torch.stack([module(s) for s in samples(x)]).detach())
    assert ((y >= lower - 1e-9) & (y <= upper + 1e-9)).all()
    lower, _ = bounded.compute_bounds(x=(x,), C=torch.zeros((2, 0, 3)), method="CROWN")
    assert lower.shape == (2, 0)


@pytest.mark.parametrize("method", ["CROWN", "alpha-CROWN"])
def test_linear_bounds_in_the_input_hold(method):
    module = Net((4, 8, 3), torch.sin, 0)
    bounded, x = BoundedModule(module, torch.zeros(1, 4)), box(4)
    lower, _, A = bounded.compute_bounds(x=(x,), method=method, return_A=True)
    s = samples(x)
    y = torch.stack([module(one) for one in s]).detach()
    below = torch.einsum("bsn,kbn->kbs", A["lA"], s) + A["lbias"]
    above = torch.einsum("bsn,kbn->kbs", A["uA"], s) + A["ubias"]
    assert (below <= y + 1e-9).all()
    assert (above >= y - 1e-9).all()
    assert (below >= lower - 1e-6).all()


@pytest.mark.parametrize("norm", [1, 2])
def test_balls_are_tighter_than_their_boxes_and_sound(norm):
    module = Net((6, 8, 3), torch.sigmoid, 0)
    bounded = BoundedModule(module, torch.zeros(1, 6))
    x = torch.randn((2, 6), dtype=torch.float64)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=0.5))
    around = BoundedTensor(x, PerturbationLpNorm(eps=0.5))
    lower, upper = bounded.compute_bounds(x=(ball,), method="CROWN")
    wide_lower, wide_upper = bounded.compute_bounds(x=(around,), method="CROWN")
    assert ((upper - lower) < (wide_upper - wide_lower)).all()
    away = torch.randn((4000, 2, 6), dtype=torch.float64)
    away *= 0.5 / torch.linalg.vector_norm(away, ord=norm, dim=-1, keepdim=True)
    y = torch.stack([module(x + a) for a in away]).detach()
    assert ((y >= lower - 1e-9) & (y <= upper + 1e-9)).all()


class Convolutions(nn.Module):
    """Strided convolution, batch normalisation, max and average pooling, a flattening, a module used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 3, 3, padding=1, groups=3),
            nn.SiLU(),
            nn.MaxPool2d(2, stride=1, padding=1),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.again = nn.Linear(12, 12)
        self.body[1].running_mean.normal_()
        self.body[1].running_var.uniform_(0.5, 2)
        self.double().eval()

    def forward(self, x):
        y = self.body(x)
        return torch.minimum(torch.tanh(self.again(y)) + y, torch.tanh(self.again(torch.tanh(self.again(y)))))


def test_convolutions_pooling_residuals_and_repeated_modules():
    module = Convolutions()
    x = torch.randn((2, 1, 8, 8), dtype=torch.float64)
    bounded = BoundedModule(module, x)
    assert torch.allclose(bounded(x), module(x), atol=1e-12)
    given = BoundedTensor(x, PerturbationLpNorm(eps=0.05))
    for method in ("IBP", "CROWN"):
        lower, upper = bounded.compute_bounds(x=(given,), method=method)
        with torch.no_grad():
            y = torch.stack([module(s) for s in samples(given, 200)])
        assert ((y >= lower - 1e-9) & (y <= upper + 1e-9)).all()


def test_operators_kept_as_functions_bound_as_their_matrices_do(monkeypatch):
    module, x = Convolutions(), torch.randn((1, 1, 8, 8), dtype=torch.float64)
    given = BoundedTensor(x, PerturbationLpNorm(eps=0.05))
    dense = BoundedModule(module, x).compute_bounds(x=(given,))
    monkeypatch.setattr("tilewright.verify.genbab.affine.DENSE_ENTRIES", 0)
    lazy = BoundedModule(module, x)
    found = lazy.compute_bounds(x=(given,))
    # Without fused matrices interval arithmetic may be looser inside, never the result tighter than sound.
    with torch.no_grad():
        y = torch.stack([module(s) for s in samples(given, 200)])
    assert ((y >= found[0] - 1e-9) & (y <= found[1] + 1e-9)).all()
    assert ((found[1] - found[0]) <= 1.5 * (dense[1] - dense[0])).all()


class Manners(nn.Module):
    """min, max and clamp of constants, tan, a masked select, slices and a layer norm."""

    def forward(self, x):
        a = torch.minimum(x, torch.tensor(0.2)) + torch.maximum(x, torch.zeros(6)) + x.clamp(min=-0.1)
        b = torch.tan(0.3 * x) + nn.functional.layer_norm(x, (6,)) + a.flip(-1)
        c = torch.where(torch.tensor([True, False] * 3), b, x.amax(-1, keepdim=True))
        return torch.cat([c[:, 1::2], x.amin(-1, keepdim=True), -(x[:, :2].unbind(1)[0][:, None])], 1)


def test_clamp_and_extrema_of_constants_bound_without_nan():
    module = Manners()
    x = box(6, 0.1)
    bounded = BoundedModule(module, torch.zeros(1, 6))
    y = torch.stack([module(s) for s in samples(x, 500)])
    for method in ("IBP", "CROWN"):
        lower, upper = bounded.compute_bounds(x=(x,), method=method)
        assert ((y >= lower - 1e-9) & (y <= upper + 1e-9)).all()


class Bad(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def test_an_unknown_operator_is_named_when_recorded():
    with pytest.raises(UnsupportedOperator, match=r"aten\.(mish|lgamma)"):
        BoundedModule(Bad(torch.lgamma), torch.ones(1, 3))


def test_an_operator_of_the_user_is_bounded_once_registered(monkeypatch):
    monkeypatch.setattr("tilewright.verify.genbab.functions.REGISTERED", REGISTERED)
    register_relaxation(
        "aten.lgamma",
        unary_relaxation(torch.lgamma, torch.digamma, (), name="lgamma", domain=(0.1, 50.0)),
    )
    try:
        bounded = BoundedModule(Bad(torch.lgamma), torch.ones(1, 3))
        x = BoundedTensor(torch.full((1, 3), 2.0), PerturbationLpNorm(eps=1.5))
        lower, upper = bounded.compute_bounds(x=(x,))
        y = torch.lgamma(torch.linspace(0.5, 3.5, 500, dtype=torch.float64))
        assert float(lower.min()) <= float(y.min()) + 1e-9
        assert float(upper.max()) >= float(y.max()) - 1e-9
    finally:
        REGISTERED.pop("aten.lgamma")


def test_no_finite_bound_is_an_error_that_names_the_node():
    bounded = BoundedModule(Bad(lambda x: 1 / x), torch.ones(1, 2))
    with pytest.raises(UnboundedError, match="reciprocal"):
        bounded.compute_bounds(x=(BoundedTensor(torch.zeros(1, 2), PerturbationLpNorm(eps=1.0)),))


@pytest.mark.parametrize(
    ("ptb", "message"),
    [
        (PerturbationLpNorm(), "eps"),
        (PerturbationLpNorm(eps=-1.0), "eps"),
        (PerturbationLpNorm(eps=math.nan), "eps"),
        (PerturbationLpNorm(norm=3, eps=1.0), "norm"),
        (PerturbationLpNorm(x_L=torch.ones(1, 4), x_U=torch.zeros(1, 4)), "empty"),
        (PerturbationLpNorm(x_L=torch.zeros(1, 4), x_U=torch.full((1, 4), math.inf)), "infinite"),
        (PerturbationLpNorm(x_L=torch.full((1, 4), math.nan), x_U=torch.ones(1, 4)), "NaN"),
        (PerturbationLpNorm(norm=2, eps=1.0, x_L=torch.ones(1, 4), x_U=2 * torch.ones(1, 4)), "centre"),
    ],
)
def test_sets_that_cannot_be_are_refused(ptb, message):
    bounded = BoundedModule(Net((4, 4, 2), torch.relu, 0), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=message):
        bounded.compute_bounds(x=(BoundedTensor(torch.zeros(1, 4), ptb),))


def test_wrong_arguments_are_named():
    module = Net((4, 4, 2), torch.relu, 0)
    bounded, x = BoundedModule(module, torch.zeros(1, 4)), box(4)
    with pytest.raises(ValueError, match="method"):
        bounded.compute_bounds(x=(x,), method="crown")
    with pytest.raises(ValueError, match="C has shape"):
        bounded.compute_bounds(x=(x,), C=torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="elements"):
        bounded.compute_bounds(x=(box(5),))
    with pytest.raises(ValueError, match="bound_opts"):
        BoundedModule(module, torch.zeros(1, 4), {"sparse": True})


def test_non_contiguous_weights_and_float32():
    module = Net((4, 8, 3), torch.tanh, 0)
    module.layers[0].weight = nn.Parameter(module.layers[0].weight.detach().T.contiguous().T)
    x = box(4)
    lower, upper = BoundedModule(module, torch.zeros(1, 4)).compute_bounds(x=(x,))
    single = BoundedModule(module.float(), torch.zeros(1, 4), {"dtype": torch.float32})
    lower32, upper32 = single.compute_bounds(x=(x,))
    assert lower32.dtype == torch.float32
    # Relative to float64: the slack of 4 eps a line, over two layers of eight units, and the sums' own rounding.
    assert torch.allclose(lower32.double(), lower, atol=1e-4)
    assert torch.allclose(upper32.double(), upper, atol=1e-4)
    assert lower.dtype == torch.float64


def test_a_half_space_cuts_the_box_as_the_linear_program_says():
    from scipy.optimize import linprog

    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    solved = 0
    for seed in range(200):
        n = (1, 2, 5, 20)[seed % 4]
        a, normal, offset = draw(1, 1, n), draw(1, 1, n), draw(1, 1) * 0.3 * n**0.5
        a[..., 0] *= seed % 5 > 0
        normal[..., 0] *= seed % 7 > 0
        low, high = -draw(1, n).abs(), draw(1, n).abs()
        exact = linprog(
            a.flatten().numpy(),
            A_ub=-normal[0].numpy(),
            b_ub=-offset[0].numpy(),
            bounds=list(zip(low[0].tolist(), high[0].tolist(), strict=True)),
        )
        cut = Region(low, high, normals=normal, offsets=offset).minimum(a)
        if exact.status == 0:
            solved += 1
            assert abs(float(cut) - exact.fun) < 1e-9
    assert solved > 120


def test_several_half_spaces_bound_from_below():
    generator = torch.Generator().manual_seed(1)
    low, high = -torch.ones((3, 6), dtype=torch.float64), torch.ones((3, 6), dtype=torch.float64)
    a, normals = (torch.randn((3, 4, 6), generator=generator, dtype=torch.float64) for _ in range(2))
    centre = 0.3 * torch.randn((3, 1, 6), generator=generator, dtype=torch.float64)
    offsets = (normals * centre).sum(-1) - 0.5  # so that some of the box is inside
    box, cut = Region(low, high), Region(low, high, normals=normals, offsets=offsets)
    x = box.sample(20000, generator)
    inside = (torch.einsum("bkn,sbn->sbk", normals, x) >= offsets).all(-1)
    value = torch.einsum("bkn,sbn->sbk", a, x).masked_fill(~inside[..., None], torch.inf)
    assert inside.any(0).all()
    assert (cut.minimum(a) <= value.amin(0) + 1e-9).all()
    assert (cut.minimum(a) >= box.minimum(a) - 1e-12).all()
    assert (cut.minimum(a) > box.minimum(a) + 1e-3).any()
    part = cut.take(torch.tensor([2]))
    assert torch.equal(part.minimum(a[2:]), cut.minimum(a)[2:])
