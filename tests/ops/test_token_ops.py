# SPDX-License-Identifier: Apache-2.0
"""Normalization, rotary angles and gated activation against float64."""

from __future__ import annotations

import pytest
import torch

from tilewright.ops import token_ops as ops
from tilewright.testing import UNIT_ROUNDOFF, isa_level, isa_levels

SHAPES = [(1,), (16,), (3, 17), (2, 5, 64), (0, 64), (40, 576)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_matches_float64(shape: tuple[int, ...], level: str) -> None:
    del level
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    y = ops.rms_norm(x, weight, 1e-5)
    exact = weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    # csrc/ops/rms_norm: the mean within (n/16 + 5) u, halved by the root; sum, root, quotient and two products
    bound = ((shape[-1] / 16 + 5) / 2 + 6) * UNIT_ROUNDOFF * exact.abs()
    assert y.dtype == torch.float32
    assert ((y.double() - exact).abs() <= bound).all()


def test_angles_are_cosines_and_sines_of_the_float32_product() -> None:
    positions, frequencies = torch.tensor([[0, 1, 7], [4095, 123456, 2]]), 10000.0 ** -(torch.arange(24) / 24)
    got = ops.rope_angles(positions, frequencies, 1.25)
    turns = (positions[..., None].float() * frequencies).double()
    exact = torch.stack((turns.cos(), turns.sin()), -2) * 1.25
    assert got.shape == (2, 3, 2, 24)
    # one rounding to float32, one of the gain
    assert ((got.double() - exact).abs() <= 2.01 * UNIT_ROUNDOFF * exact.abs()).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_activation_matches_float64(shape: tuple[int, ...], level: str) -> None:
    del level
    gate, up = torch.randn(shape) * 8, torch.randn(shape)
    y = ops.gated_activation(gate, up)
    exact = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    # csrc/ops/gated_activation: below 5 units in the last place, 2 u each, and the product
    assert ((y.double() - exact).abs() <= 11 * UNIT_ROUNDOFF * exact.abs()).all()


def test_levels_give_the_same_bits() -> None:
    x, y, weight = torch.randn(5, 50), torch.randn(5, 50), torch.randn(50)
    results = []
    for name in isa_levels():
        with isa_level(name):
            results.append((ops.rms_norm(x, weight, 1e-6), ops.gated_activation(x, y)))
    for norm, gated in results:
        assert torch.equal(norm, results[0][0])
        assert torch.equal(gated, results[0][1])


def test_strides_and_dtypes() -> None:
    x = torch.randn(6, 4).t()
    weight = torch.randn(6)
    assert torch.equal(ops.rms_norm(x, weight, 0.0), ops.rms_norm(x.contiguous(), weight, 0.0))
    half = x.to(torch.bfloat16)
    assert torch.equal(ops.gated_activation(half, half), ops.gated_activation(half.float(), half.float()).bfloat16())


def test_what_is_not_finite_stays_in_its_token() -> None:
    x = torch.ones(3, 20)
    x[1, 4] = torch.nan
    y = ops.rms_norm(x, torch.ones(20), 1e-5)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_wrong_arguments_are_errors() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="must be K = 5"):
        ops.rms_norm(x, torch.ones(5), 1e-5)
    with pytest.raises(RuntimeError, match="eps = -1"):
        ops.rms_norm(x, torch.ones(4), -1.0)
    with pytest.raises(RuntimeError, match="they must be the same"):
        ops.gated_activation(x, torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="positions has dtype"):
        ops.rope_angles(torch.ones(3), torch.ones(2))


def test_opcheck() -> None:
    x = torch.randn(3, 8)
    library = torch.ops.tilewright
    torch.library.opcheck(library.rms_norm.default, (x, torch.ones(8), 1e-5))
    torch.library.opcheck(library.gated_activation.default, (x, x))
    torch.library.opcheck(library.rope_angles.default, (torch.arange(3), torch.ones(4), 1.0))


@pytest.mark.parametrize(
    ("tokens", "heads", "rows", "size"), [(0, 2, 1, 8), (1, 1, 1, 2), (3, 6, 3, 40), (40, 4, 4, 64)]
)
def test_rotation_matches_float64(tokens: int, heads: int, rows: int, size: int, level: str) -> None:
    del level
    x, scales = torch.randn(tokens, heads, size), torch.rand(rows, size) + 0.5
    angles = ops.rope_angles(torch.arange(tokens) * 7, 10000.0 ** -(torch.arange(size // 2) / (size // 2)))
    low, high = x.double().chunk(2, -1)
    cosine, sine = angles.double()[:, None].unbind(-2)
    factors = scales.double().repeat_interleave(heads // rows, 0)
    exact = torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)
    # two products and a sum of magnitudes no larger than |low| + |high|, then the factor
    bound = 3 * UNIT_ROUNDOFF * (low.abs() + high.abs()).repeat(1, 1, 2)
    plain, scaled = x.clone(), x.clone()
    ops.rope_rotate_(plain, angles)
    ops.rope_rotate_(scaled, angles, scales)
    assert ((plain.double() - exact).abs() <= bound).all()
    assert ((scaled.double() - exact * factors).abs() <= 2 * bound * factors).all()


@pytest.mark.parametrize(
    ("x", "angles", "scales", "words"),
    [
        (torch.zeros(2, 3, 4).double(), torch.zeros(2, 2, 2), None, "x has dtype"),
        (torch.zeros(2, 3, 5), torch.zeros(2, 2, 2), None, "D = 5, needed an even number"),
        (torch.zeros(2, 4, 3).mT, torch.zeros(2, 2, 2), None, "must be contiguous"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 2, 2), None, "must be T = 2"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 2, 2), torch.ones(2, 4), "2 rows, which do not divide the H = 3"),
    ],
)
def test_rotation_refuses_what_does_not_fit(
    x: torch.Tensor, angles: torch.Tensor, scales: torch.Tensor | None, words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        ops.rope_rotate_(x, angles, scales)
