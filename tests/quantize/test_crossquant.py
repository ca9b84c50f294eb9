# SPDX-License-Identifier: Apache-2.0
"""CrossQuant's scales and its integer layer, against the equations in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tilewright.quantize.crossquant import (
    CrossQuantConfig,
    CrossQuantLinear,
    column_factors,
    crossquant,
    crossquant_scale,
    fake_crossquant,
    per_channel_scale,
    per_token_scale,
    quantization_kernel_proportion,
)
from tilewright.quantize.crossquant.linear import int_matmul, quantize_rows, quantize_weight

# A shared machine stalls any example; the count keeps the file short.
examples = settings(deadline=None, max_examples=30)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 33))
ALPHAS = st.sampled_from([0.0, 0.05, 0.15, 0.5, 0.9, 1.0])
BITS = st.integers(2, 8)
SEEDS = st.integers(0, 10_000)


def heavy(shape, seed=0, dtype=torch.float32):
    """Values over many decades, some columns and rows of zeros."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) * torch.exp(2 * torch.randn(shape, generator=random))
    x = x * (torch.rand(shape[-1], generator=random) > 0.1) * (torch.rand(*shape[:-1], 1, generator=random) > 0.1)
    return x.to(dtype)


def by_the_paper(x, bits, alpha):
    """Codes and steps of equation 2, float64, written elementwise."""
    x = x.double()
    top = 2 ** (bits - 1) - 1
    t, c = x.abs().amax(-1, keepdim=True), x.abs().amax(0)
    step = t**alpha * c ** (1 - alpha) / top
    return torch.where(step > 0, x / step, torch.zeros_like(x)), step


@examples
@given(SHAPES, BITS, ALPHAS, SEEDS)
def test_dynamic_codes_are_those_of_the_equation(shape, bits, alpha, seed):
    x = heavy(shape, seed)
    q, row, col = crossquant(x, bits, alpha)
    exact, step = by_the_paper(x, bits, alpha)
    # A code is the nearest integer of a quotient that is right to a few units of 2^-23 of itself.
    assert bool(((q.double() - exact).abs() <= 0.5 + 2 ** (bits - 1) * 2.0**-20).all())
    used = (row.double() * col.double())[step > 0]
    torch.testing.assert_close(used, step[step > 0], rtol=2.0**-20, atol=0)


@examples
@given(SHAPES, BITS, ALPHAS, SEEDS)
def test_dynamic_never_clips(shape, bits, alpha, seed):
    x = heavy(shape, seed)
    _, row, col = crossquant(x, bits, alpha)
    top = 2 ** (bits - 1) - 1
    assert float((x.abs() / (row * col)).max()) <= top * (1 + 2.0**-20)
    assert bool(((fake_crossquant(x, bits, alpha) - x).abs() <= row * col * (0.5 + top * 2.0**-20)).all())


@examples
@given(SHAPES, BITS, SEEDS)
def test_the_ends_are_per_token_and_per_channel_bit_for_bit(shape, bits, seed):
    x = heavy(shape, seed)
    assert torch.equal(crossquant_scale(x, bits, 1.0), per_token_scale(x, bits).expand_as(x))
    zero_rows = x.abs().amax(-1) == 0
    ours = crossquant_scale(x, bits, 0.0)[~zero_rows]
    torch.testing.assert_close(ours, per_channel_scale(x, bits).expand_as(ours), rtol=2.0**-22, atol=0)


@examples
@given(SHAPES, BITS, ALPHAS, SEEDS)
def test_tight_steps_are_no_larger(shape, bits, alpha, seed):
    x = heavy(shape, seed)
    c = x.abs().amax(0)
    tight, loose = (crossquant(x, bits, alpha, c, mode)[1] for mode in ("tight", "static"))
    alive = x.abs().amax(-1) > 0
    assert bool((tight[alive] <= loose[alive] * (1 + 2.0**-20)).all())


@examples
@given(SHAPES, BITS, ALPHAS, SEEDS)
def test_rows_of_the_dynamic_form_with_its_own_maxima_are_the_static_form(shape, bits, alpha, seed):
    x = heavy(shape, seed)
    dynamic, static = crossquant(x, bits, alpha), crossquant(x, bits, alpha, x.abs().amax(0), "static")
    assert all(torch.equal(a, b) for a, b in zip(dynamic, static, strict=True))


def test_static_saturates_and_tight_does_not():
    c, x = torch.ones(4), torch.tensor([[8.0, 0.5, 0.25, -0.5]])
    assert crossquant(x, 8, 0.15, c, "static")[0][0, 0] == 127
    step = crossquant_scale(x, 8, 0.15, c, "static")
    assert float(x[0, 0] / step[0, 0]) > 127
    assert float((x / crossquant_scale(x, 8, 0.15, c, "tight")).abs().max()) <= 127 * (1 + 2.0**-20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fake_form_keeps_shape_and_dtype(dtype):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = fake_crossquant(x)
    assert (got.shape, got.dtype) == (x.shape, dtype)
    assert got.is_contiguous()
    assert torch.equal(fake_crossquant(x.transpose(0, 1)), got.transpose(0, 1))


def test_massive_half_precision_values_do_not_overflow():
    x = torch.full((2, 3), 6e4, dtype=torch.float16)
    assert bool(torch.isfinite(fake_crossquant(x)).all())


def test_gradient_passes_straight_through():
    x = heavy((4, 6)).requires_grad_()
    (fake_crossquant(x, 4) * torch.arange(6.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(6.0).expand(4, 6))


def test_zero_rows_empty_input_and_damaged_rows():
    assert not fake_crossquant(torch.zeros(3, 4)).any()
    q, row, _ = crossquant(torch.empty(0, 4))
    assert (q.shape, row.shape) == ((0, 4), (0, 1))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    damaged = x.clone()
    damaged[1, 2] = float("nan")
    got = fake_crossquant(damaged)
    assert bool(got[1].isnan().all())
    assert torch.equal(got[[0, 2]], fake_crossquant(x[[0, 2]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        crossquant(damaged, strict=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "from 2 to 8"),
        ({"bits": 9}, "from 2 to 8"),
        ({"bits": 8.0}, "from 2 to 8"),
        ({"alpha": -0.1}, "from 0"),
        ({"alpha": 1.5}, "from 0"),
        ({"alpha": float("nan")}, "from 0"),
        ({"mode": "fast"}, "mode='fast'"),
        ({"mode": "tight"}, "needs col_absmax"),
        ({"col_absmax": torch.ones(4)}, "leave col_absmax out"),
        ({"mode": "static", "col_absmax": torch.ones(3)}, r"\[4\] is needed"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        crossquant(torch.ones(2, 4), **arguments)


def test_kernel_proportion_counts_zeros_apart():
    x = torch.tensor([[0.0, 0.4, 0.6, -0.5, -2.0]])
    found = quantization_kernel_proportion(x, torch.ones(()))
    # 0.5 is half a step and goes to the even 0.
    assert (found.all, found.nonzero, found.exact_zero) == (3 / 5, 2 / 4, 1 / 5)
    with pytest.raises(ValueError, match="x is empty"):
        quantization_kernel_proportion(torch.empty(0), torch.ones(()))


@examples
@given(SHAPES, BITS, SEEDS)
def test_kernel_is_what_the_codes_say(shape, bits, seed):
    x = heavy(shape, seed)
    zeros = float((crossquant(x, bits)[0] == 0).double().mean())
    assert quantization_kernel_proportion(x, crossquant_scale(x, bits)).all == pytest.approx(zeros)


def test_column_factors_have_geometric_mean_one_and_leave_dead_columns():
    c = torch.tensor([0.0, 1e-3, 1.0, 1e4])
    u = column_factors(c, 0.15)
    assert u[0] == 1
    assert float(u[1:].double().log().mean()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(u[3] / u[2], (c[3] / c[2]) ** 0.85)
    assert torch.equal(column_factors(c, 1.0), torch.ones(4))
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="negative, infinite or NaN"):
            column_factors(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("width", [1, 31, 64, 1500])
def test_integer_product_is_exact(width):
    random = torch.Generator().manual_seed(width)
    a, b = (torch.randint(-127, 128, (n, width), dtype=torch.int8, generator=random) for n in (5, 7))
    assert torch.equal(int_matmul(a, b), (a.long() @ b.long().T).float())
    largest = torch.full((2, width), 127, dtype=torch.int8)
    assert float(int_matmul(largest, -largest)[0, 0]) == -(127**2) * width


@pytest.mark.parametrize("tokens", [1, 5, 700])
def test_blocked_rows_are_the_plain_ones(tokens):
    x = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(0))
    inverse = torch.rand(200, generator=torch.Generator().manual_seed(1)) + 0.5
    codes, scale = quantize_rows(x, 8, inverse)
    whole = quantize_rows(x * inverse, 8)
    assert torch.equal(codes, whole[0])
    assert torch.equal(scale, whole[1])
    # The native quantizer multiplies by the reciprocal: a tie may fall either way.
    assert int((codes.int() - (x * inverse / scale).round().int()).abs().max()) <= 1


def test_rows_of_tiny_values_keep_their_own_scale():
    x = torch.tensor([[1e-7, -5e-8, 0.0], [1.0, 2.0, 3.0]])
    codes, scale = quantize_rows(x)
    assert codes[0].tolist() == [127, -64, 0]
    torch.testing.assert_close(scale[0, 0], torch.tensor(1e-7 / 127))


def test_damaged_tokens_stay_alone():
    layer = CrossQuantLinear(torch.randn(4, 8), None, torch.ones(8))
    x = torch.randn(3, 8)
    x[1, 0] = float("inf")
    y = layer(x)
    assert bool(y[1].isnan().all())
    assert bool(torch.isfinite(y[[0, 2]]).all())


@pytest.mark.parametrize("mode", ["tight", "static"])
@pytest.mark.parametrize("a_bits", [8, 6, 4])
@pytest.mark.parametrize(("w_bits", "group"), [(8, 128), (4, 32)])
def test_integer_layer_is_its_fake_form(mode, a_bits, w_bits, group):
    random = torch.Generator().manual_seed(a_bits)
    linear = nn.Linear(80, 24)
    x = torch.randn(6, 9, 80, generator=random) * torch.exp(torch.randn(80, generator=random))
    c = x[:4].abs().amax((0, 1))
    layer = CrossQuantLinear.from_linear(linear, c, w_bits=w_bits, group_size=group, a_bits=a_bits, mode=mode)
    u = column_factors(c)
    codes, scale = quantize_weight(linear.weight * u, w_bits, group if w_bits == 4 else None)
    wide = scale.double().repeat_interleave(group, 1)[:, :80] if w_bits == 4 else scale.double()
    what = codes.double() * wide / u.double()
    expected = fake_crossquant(x, a_bits, 0.15, c, mode).double() @ what.T + linear.bias.double()
    assert float(((layer(x) - expected).abs().max() / expected.abs().max()).detach()) < 1e-5


def test_folding_into_a_norm_changes_nothing_but_the_place():
    norm, linear = nn.LayerNorm(16), nn.Linear(16, 5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    c = norm(x).abs().amax(0).detach()
    online = CrossQuantLinear.from_linear(linear, c)(norm(x))
    folded = CrossQuantLinear.from_linear(linear, c, fold_into=norm)
    # x / u rounded once more may move a code at a tie by one of 127 steps, in one of 16 columns.
    assert float((folded(norm(x)) - online).abs().max()) < 0.005 * float(online.abs().max())
    assert "folded" in repr(folded)


def test_bad_layers_are_refused():
    linear = nn.Linear(8, 4)
    for change, message in (
        ({"col_absmax": torch.ones(7)}, r"\[8\] is needed"),
        ({"col_absmax": torch.full((8,), float("nan"))}, "infinite or NaN"),
        ({"w_bits": 5}, "8 or 4"),
        ({"mode": "dynamic"}, "'tight' or 'static'"),
        ({"a_bits": 0}, "from 2 to 8"),
        ({"fold_into": nn.Linear(3, 5)}, "8 outputs are needed"),
        ({"fold_into": nn.ReLU()}, "no weight"),
    ):
        with pytest.raises(ValueError, match=message):
            CrossQuantLinear.from_linear(linear, **({"col_absmax": torch.ones(8)} | change))
    with torch.no_grad():
        linear.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="weight holds NaN"):
        CrossQuantLinear.from_linear(linear, torch.ones(8))


def test_config_survives_plain_types():
    config = CrossQuantConfig(w_bits=4, alpha="search", alphas=(0.0, 0.5), skip=("head",))
    assert CrossQuantConfig.from_dict(config.to_dict()) == config
    for wrong, message in (
        ({"w_bits": 6}, "w_bits=6"),
        ({"a_bits": 9}, "from 2 to 8"),
        ({"alpha": 2}, "from 0"),
        ({"alpha": "best"}, "from 0"),
        ({"alphas": []}, "at least one"),
        ({"mode": "dynamic"}, "mode='dynamic'"),
        ({"group_size": 10}, "multiple of 16"),
        ({"aplha": 0.1}, "did you mean 'alpha'"),
    ):
        with pytest.raises(ValueError, match=message):
            CrossQuantConfig.from_dict(wrong)
