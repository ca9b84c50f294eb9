# SPDX-License-Identifier: Apache-2.0
"""W4A8Linear against a float64 product of the rounded activations and the dequantized weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tilewright.formats import Int4Weight, quantize_int4
from tilewright.nn import W4A8Linear
from tilewright.ops import quantize_fp8_per_token, quantize_int8_per_token


def make(n: int, k: int, *, symmetric: bool = True, group: int = 32, bias: bool = True, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = quantize_int4(torch.randn(n, k, generator=generator) * 0.1, group, torch.float32, symmetric=symmetric)
    return weight, torch.randn(n, generator=generator) if bias else None, generator


def oracle(
    x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None, act: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer in float64, and the sum of the magnitudes that enter each output."""
    codes, scale = quantize_fp8_per_token(x) if act == "fp8" else quantize_int8_per_token(x)
    rounded = codes.double() * scale.double()[..., None]
    dense = weight.dequantize(torch.float64)
    # u * scale and the minimum are summed apart, so their magnitudes count apart
    parts = dense.abs()
    if not weight.symmetric:
        offsets = weight.offsets.double().repeat_interleave(weight.group_size, 1)[:, : weight.shape[1]]
        parts = (dense - offsets).abs() + offsets.abs()
    y, size = rounded @ dense.T, rounded.abs() @ parts.T
    return (y, size) if bias is None else (y + bias.double(), size + bias.double().abs())


@pytest.mark.parametrize("act", ["fp8", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(1, 16), (17, 48), (64, 576), (33, 100)])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3)])
def test_output_matches_float64(act, symmetric, shape, lead):
    weight, bias, generator = make(*shape, symmetric=symmetric)
    layer = W4A8Linear(weight, bias, act=act)
    x = torch.randn(*lead, shape[1], generator=generator)
    y, size = oracle(x, weight, bias, act)
    got = layer(x).double()
    assert got.shape == (*lead, shape[0])
    # at most 2 K + 2 terms, each with two roundings, summed in float32 in any order, then one rounding of the result
    assert ((got - y).abs() <= (2 * shape[1] + 8) * 2**-24 * size + 2**-24 * y.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_keeps_the_dtype_of_x(dtype):
    weight, bias, generator = make(32, 64)
    assert W4A8Linear(weight, bias)(torch.randn(3, 64, generator=generator).to(dtype)).dtype == dtype


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip_is_bitwise(bias):
    weight, b, generator = make(32, 64, bias=bias)
    other, b2, _ = make(32, 64, bias=bias, seed=1)
    first, second = W4A8Linear(weight, b), W4A8Linear(other, b2)
    x = torch.randn(5, 64, generator=generator)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_state_dict_of_another_shape_is_refused():
    first, second = (W4A8Linear(*make(n, 64)[:2]) for n in (32, 48))
    with pytest.raises(RuntimeError, match="packed"):
        second.load_state_dict(first.state_dict())


def test_casting_the_module_does_not_touch_the_weight():
    weight, bias, _ = make(32, 64)
    layer = W4A8Linear(weight, bias)
    before = layer.packed.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.packed, before)
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(layer).packed, before)


def test_from_linear_rounds_the_weight_and_keeps_the_bias():
    torch.manual_seed(0)
    linear = nn.Linear(96, 24)
    layer = W4A8Linear.from_linear(linear, group_size=32, act="int8")
    x = torch.randn(4, 96)
    weight = quantize_int4(linear.weight, 32, torch.bfloat16)
    expected = W4A8Linear(weight, linear.bias, act="int8")(x)
    assert torch.equal(layer(x), expected)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 0


def test_gradient_is_straight_through_the_dequantized_weight():
    weight, bias, generator = make(24, 48)
    layer = W4A8Linear(weight, bias, input_gradient=True)
    x = torch.randn(2, 3, 48, generator=generator, requires_grad=True)
    upstream = torch.randn(2, 3, 24, generator=generator)
    layer(x).backward(upstream)
    expected = upstream.double() @ weight.dequantize(torch.float64)
    size = upstream.double().abs() @ weight.dequantize(torch.float64).abs()
    # float32 sum of N terms
    assert ((x.grad.double() - expected).abs() <= 25 * 2**-23 * size).all()


def test_gradient_without_the_canonical_weight_is_refused():
    layer = W4A8Linear(*make(24, 48)[:2])
    with pytest.raises(RuntimeError, match="input_gradient=True"):
        layer(torch.ones(1, 48, requires_grad=True))
    with torch.no_grad():
        assert layer(torch.ones(1, 48, requires_grad=True)).shape == (1, 24)


def test_compiles_without_a_graph_break():
    weight, bias, generator = make(24, 48)
    layer = W4A8Linear(weight, bias)
    x = torch.randn(3, 48, generator=generator)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act": "int4"}, "act = 'int4'"),
        ({"mode": "loose"}, "mode = 'loose'"),
        ({"mode": "fold", "act": "int8"}, "'fold' with 'fp8'"),
        ({"bias": torch.zeros(3)}, r"bias has shape \[3\]"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    weight, _, _ = make(24, 48)
    with pytest.raises(ValueError, match=message):
        W4A8Linear(weight, **options)


def test_fold_needs_a_symmetric_weight():
    weight, _, _ = make(24, 48, symmetric=False)
    with pytest.raises(ValueError, match="symmetric"):
        W4A8Linear(weight, mode="fold")


def test_groups_of_columns_with_a_scale_of_their_own():
    """A column 1000 times larger than the rest rounds its own group away, no other."""
    weight, bias, generator = make(24, 96)
    x = torch.randn(3, 96, generator=generator)
    x[:, 0] = 1000
    codes, scale = quantize_int8_per_token(x, 32)
    rounded = codes.double() * scale.double().repeat_interleave(32, -1)
    dense = weight.dequantize(torch.float64)
    need, size = rounded @ dense.T + bias.double(), rounded.abs() @ dense.abs().T + bias.double().abs()
    got = W4A8Linear(weight, bias, act="int8", scale_group=32)(x).double()
    # the bound of test_output_matches_float64
    assert ((got - need).abs() <= (2 * 96 + 8) * 2**-24 * size + 2**-24 * need.abs()).all()
    assert not torch.equal(got, W4A8Linear(weight, bias, act="int8")(x).double())


@pytest.mark.parametrize("options", [{"act": "int8", "scale_group": 48}, {"act": "fp8", "scale_group": 32}])
def test_scale_groups_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="scale_group"):
        W4A8Linear(make(24, 96)[0], **options)
