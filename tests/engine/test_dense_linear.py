# SPDX-License-Identifier: Apache-2.0
"""INT8 and bfloat16 matrices of heads and embeddings against exact arithmetic."""

from __future__ import annotations

import pytest
import torch
from engine_models import int8_weight

from tilewright.formats.int8 import Int8Weight
from tilewright.ops import dense_linear as ops
from tilewright.testing import UNIT_ROUNDOFF, isa_level

SHAPES = [(1, 1, 32), (3, 16, 64), (5, 17, 96), (4, 33, 576), (9, 130, 320), (0, 20, 64)]


def int8_oracle(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """Integers exactly, the rest in float64."""
    scale = x.abs().amax(-1, keepdim=True) / torch.tensor(32512.0)
    codes = torch.where(scale == 0, torch.zeros_like(x), x / scale).round().double()
    return codes @ weight.dequantize().double().T * scale.double()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8_matches_exact_integers(m: int, n: int, k: int, level: str) -> None:
    del level
    weight, x = int8_weight(torch.randn(n, k)), torch.randn(m, k)
    y = ops.int8_linear(x, ops.int8_pack(weight), n)
    exact = int8_oracle(x, weight)
    # One float32 rounding for each group's integer and one for each multiply-add, one for the token's scale; the codes
    # are those of the oracle, since both divide in float32.
    terms = x.double().abs() @ weight.dequantize().double().abs().T
    assert ((y.double() - exact).abs() <= (k // 32 * 2 + 2) * UNIT_ROUNDOFF * terms + 1e-30).all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8_levels_and_batches_give_the_same_bits(m: int, n: int, k: int, level: str) -> None:
    del level
    weight, x = int8_weight(torch.randn(n, k)), torch.randn(m, k)
    blob = ops.int8_pack(weight)
    y = ops.int8_linear(x, blob, n)
    rows = [ops.int8_linear(row[None], blob, n) for row in x]
    assert all(torch.equal(row[0], y[i]) for i, row in enumerate(rows))
    with isa_level("generic"):
        assert torch.equal(ops.int8_linear(x, blob, n), y)


@pytest.mark.parametrize("sign", [1, -1])
def test_int8_extremes_of_one_sign_do_not_overflow(sign: int, level: str) -> None:
    del level
    k, n = 4096, 16
    for code in (-128, 127):
        weight = Int8Weight(torch.full((n, k), code, dtype=torch.int8), torch.ones(n, k // 32, dtype=torch.float16))
        y = ops.int8_linear(torch.full((2, k), float(sign)), ops.int8_pack(weight), n)
        assert torch.allclose(y, torch.full_like(y, float(sign * code * k)), rtol=1e-5)


def test_int8_activations_are_256_times_finer_than_8_bits(level: str) -> None:
    del level
    weight, x = int8_weight(torch.randn(64, 576)), torch.randn(8, 576)
    exact = x.double() @ weight.dequantize().double().T
    error = (ops.int8_linear(x, ops.int8_pack(weight), 64).double() - exact).abs()
    # half a step of each activation, all of one sign at worst
    half_step = x.abs().amax(-1, keepdim=True).double() / 32512 / 2
    assert (error <= half_step * weight.dequantize().double().abs().sum(-1) * 1.01).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_int8_keeps_what_is_not_finite_to_its_token(value: float, level: str) -> None:
    del level
    weight, x = int8_weight(torch.randn(20, 64)), torch.randn(3, 64)
    blob = ops.int8_pack(weight)
    clean = ops.int8_linear(x, blob, 20)
    x[1, 40] = value
    y = ops.int8_linear(x, blob, 20)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-34, 1e30])
def test_int8_tiny_and_huge_tokens(size: float, level: str) -> None:
    del level
    weight, x = int8_weight(torch.randn(20, 64)), torch.randn(2, 64).clamp(-1, 1) * size
    y = ops.int8_linear(x, ops.int8_pack(weight), 20)
    exact = x.double() @ weight.dequantize().double().T
    tolerance = x.abs().amax().double() * 64 * 4 / 32512 + 1e-31
    assert ((y.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (2, 5, 33), (6, 70, 1)])
def test_bfloat16_matches_float64(m: int, n: int, k: int, level: str) -> None:
    del level
    weight, x = torch.randn(n, k).bfloat16(), torch.randn(m, k)
    blob = ops.bfloat16_pack(weight)
    y = ops.bfloat16_linear(x, blob, n)
    terms = x.double().abs() @ weight.double().abs().T
    assert ((y.double() - x.double() @ weight.double().T).abs() <= (k / 32 + 7) * UNIT_ROUNDOFF * terms).all()
    assert all(torch.equal(ops.bfloat16_linear(x[i : i + 1], blob, n)[0], y[i]) for i in range(m))
    with isa_level("generic"):
        assert torch.equal(ops.bfloat16_linear(x, blob, n), y)


def test_wrong_arguments_are_errors() -> None:
    weight = int8_weight(torch.randn(20, 64))
    int8, half = ops.int8_pack(weight), ops.bfloat16_pack(torch.randn(20, 64).bfloat16())
    with pytest.raises(RuntimeError, match="packed format"):
        ops.int8_linear(torch.randn(1, 64), half, 20)
    with pytest.raises(RuntimeError, match="packed format"):
        ops.bfloat16_linear(torch.randn(1, 64), int8, 20)
    with pytest.raises(RuntimeError, match="K = 64"):
        ops.int8_linear(torch.randn(1, 63), int8, 20)
    with pytest.raises(RuntimeError, match="out_features = 21"):
        ops.int8_linear(torch.randn(1, 64), int8, 21)
    with pytest.raises(RuntimeError, match="needs"):
        ops.int8_linear(torch.randn(1, 64), int8[:-64], 20)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.bfloat16_pack(torch.randn(20, 64))


def test_leading_dimensions_strides_and_dtypes() -> None:
    weight, x = int8_weight(torch.randn(20, 64)), torch.randn(64, 3, 2).permute(2, 1, 0)
    blob = ops.int8_pack(weight)
    assert torch.equal(
        ops.int8_linear(x, blob, 20), ops.int8_linear(x.contiguous().view(6, 64), blob, 20).view(2, 3, 20)
    )
    assert ops.int8_linear(x.bfloat16(), blob, 20).dtype == torch.bfloat16


def test_opcheck() -> None:
    weight = int8_weight(torch.randn(20, 64))
    torch.library.opcheck(torch.ops.tilewright.int8_linear, (torch.randn(2, 64), ops.int8_pack(weight), 20))
    blob = ops.bfloat16_pack(torch.randn(20, 64).bfloat16())
    torch.library.opcheck(torch.ops.tilewright.bfloat16_linear, (torch.randn(2, 64), blob, 20))
