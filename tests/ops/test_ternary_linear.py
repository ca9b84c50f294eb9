# SPDX-License-Identifier: Apache-2.0
"""ternary_matmul and ternary_linear. Integers equal torch's int64 product, whatever the packing and the level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright import ops
from tilewright.formats import PackedTernary, pack_ternary, quantize_ternary
from tilewright.testing import isa_level, isa_levels

OWN = ("q2", "t3w", "t5", "mma2", "hf")
SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (1024, 2560), (33, 70), (1, 1), (16, 9), (31, 27)]


def random_weight(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8)


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def oracle(x: Tensor, weight: Tensor) -> Tensor:
    """In float64 products of at most 2^7 * 2^24 are exact integers; int64 says so."""
    return (x.double() @ weight.double().T).to(torch.int64)


def check(x: Tensor, weight: Tensor, packing: str) -> None:
    got = ops.ternary_matmul(x, pack_ternary(weight, packing))
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), oracle(x, weight)), packing


@pytest.mark.parametrize("packing", ["q2", "t3w"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_integers_are_exact(level: str, packing: str, rows: int, columns: int) -> None:
    weight = random_weight(rows, columns)
    for tokens in (1, 2, 3, 8, 17):
        check(random_codes(tokens, columns), weight, packing)


@pytest.mark.parametrize("packing", OWN)
def test_every_packing_multiplies(packing: str) -> None:
    weight = random_weight(70, 130)
    check(random_codes(6, 130), weight, packing)


@pytest.mark.parametrize("packing", ["i2_s", "tq1_0", "tq2_0"])
def test_packings_of_other_programs_multiply(packing: str) -> None:
    weight = random_weight(9, 512)
    check(random_codes(3, 512), weight, packing)


@pytest.mark.parametrize("packing", ["q2", "t3w", "mma2"])
@pytest.mark.parametrize("columns", [1, 4096, 11008, 1 << 17])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("code", [127, -128])
def test_products_of_one_sign_do_not_wrap(level: str, packing: str, columns: int, sign: int, code: int) -> None:
    weight = torch.full((17, columns), sign, dtype=torch.int8)
    x = torch.full((2, columns), code, dtype=torch.int8)
    got = ops.ternary_matmul(x, pack_ternary(weight, packing))
    assert torch.equal(got, torch.full((2, 17), sign * code * columns, dtype=torch.int32))


def int16_chain(x: Tensor, weight: Tensor, pairs: int) -> Tensor:
    """What a dot product gives that adds `pairs` pairs of code products in 16 bits before it widens them, as a kernel
    of two-bit codes with vpmaddubsw does: columns j, j + 1 of one byte lane after the other."""
    products = (weight.long() + 1) * x.long()
    chains = products.view(-1, pairs, 2).sum(-1)
    wrapped = (chains.sum(-1) + 2**15) % 2**16 - 2**15
    return wrapped.sum() - x.long().sum()


def test_longer_sums_in_sixteen_bits_would_be_wrong_and_these_are_not(level: str) -> None:
    """Other programs add 128 pairs in 16 bits, where 64 fit: all weights 1 and all activations 127 show it."""
    columns = 4096
    x, weight = torch.full((1, columns), 127, dtype=torch.int8), torch.ones(64, columns, dtype=torch.int8)
    exact = 127 * columns
    assert int(int16_chain(x[0], weight[0], 128)) != exact
    assert int(int16_chain(x[0], weight[0], 64)) == exact
    for packing in ("q2", "t3w"):
        assert torch.equal(
            ops.ternary_matmul(x, pack_ternary(weight, packing)), torch.full((1, 64), exact, dtype=torch.int32)
        )


@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 400),
    tokens=st.integers(0, 12),
    packing=st.sampled_from(OWN),
    level_name=st.sampled_from(isa_levels()),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_any_shape(rows: int, columns: int, tokens: int, packing: str, level_name: str, seed: int) -> None:
    torch.manual_seed(seed)
    with isa_level(level_name):
        check(random_codes(tokens, columns), random_weight(rows, columns), packing)


@pytest.mark.parametrize("packing", OWN)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
def test_empty_dimensions(level: str, packing: str, tokens: int, rows: int, columns: int) -> None:
    packed = pack_ternary(torch.zeros(rows, columns, dtype=torch.int8), packing)
    got = ops.ternary_matmul(torch.zeros(tokens, columns, dtype=torch.int8), packed)
    assert torch.equal(got, torch.zeros(tokens, rows, dtype=torch.int32))
    assert torch.equal(ops.ternary_linear(torch.zeros(tokens, columns), packed), torch.zeros(tokens, rows))


def test_strided_and_batched_inputs_equal_contiguous_ones(level: str) -> None:
    weight = random_weight(20, 48)
    packed = pack_ternary(weight, "q2")
    strided, transposed = random_codes(3, 5, 96)[..., ::2], random_codes(48, 6).T
    assert torch.equal(ops.ternary_matmul(strided, packed).long(), oracle(strided, weight))
    assert torch.equal(ops.ternary_matmul(transposed, packed).long(), oracle(transposed, weight))
    assert ops.ternary_matmul(random_codes(48), packed).shape == (20,)


def test_a_blob_at_an_odd_address_is_read_right(level: str) -> None:
    weight, x = random_weight(70, 100), random_codes(4, 100)
    for packing in ("q2", "t3w"):
        packed = pack_ternary(weight, packing)
        shifted = torch.empty(packed.data.numel() + 1, dtype=torch.uint8)[1:]
        shifted.copy_(packed.data)
        moved = PackedTernary(shifted, packed.shape, packed.format, packed.scale)
        assert torch.equal(ops.ternary_matmul(x, moved).long(), oracle(x, weight))


def quantize_by_definition(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = x.abs().amax(-1).clamp(min=1e-5) / 127
    codes = (x / scale[..., None]).round().clamp(-128, 127)
    return codes.to(torch.int8), scale


@pytest.mark.parametrize("columns", [1, 7, 16, 17, 576, 1000])
@pytest.mark.parametrize("size", [1.0, 1e-7, 0.0, 1e30])
def test_activations_are_rounded_as_defined(level: str, columns: int, size: float) -> None:
    x = torch.randn(5, columns) * size
    codes, scale = ops.quantize_ternary_activation(x)
    want_codes, want_scale = quantize_by_definition(x)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale, want_scale)


def test_halves_round_to_even(level: str) -> None:
    """A scale of exactly 1: halves between codes."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    codes, scale = ops.quantize_ternary_activation(x)
    assert float(scale) == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]


@pytest.mark.parametrize("packing", ["q2", "t3w", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_its_definition(level: str, packing: str, dtype: torch.dtype, per_row: bool, with_bias: bool) -> None:
    """Bit for bit: the integer is rounded to float32, the scales' product is, and the last step is one operation, which
    float64 computes exactly enough to be rounded once more (24 + 24 bits and a sum of close terms)."""
    weight, x = random_weight(70, 100), torch.randn(6, 100).to(dtype)
    scale = torch.rand(70 if per_row else 1) + 0.1
    bias = torch.randn(70) if with_bias else None
    got = ops.ternary_linear(x, pack_ternary(weight, packing, scale=scale), bias)
    codes, token_scale = quantize_by_definition(x)
    exact = oracle(codes, weight).float().double() * (token_scale[:, None] * scale).double()
    want = (exact if bias is None else exact + bias.double()).float().to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_levels_and_packings_give_the_same_bits() -> None:
    weight, x, bias = random_weight(130, 500), torch.randn(13, 500), torch.randn(130)
    results = []
    for name in isa_levels():
        with isa_level(name):
            results += [ops.ternary_linear(x, pack_ternary(weight, f, scale=0.37), bias) for f in OWN]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_token_does_not_depend_on_its_neighbours_nor_on_threads(level: str) -> None:
    packed, x = pack_ternary(random_weight(333, 160), "q2", scale=0.1), torch.randn(23, 160)
    together = ops.ternary_linear(x, packed)
    assert torch.equal(together, torch.cat([ops.ternary_linear(row[None], packed) for row in x]))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.ternary_linear(x, packed), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_spoils_only_itself(level: str, poison: float) -> None:
    packed, x = pack_ternary(random_weight(20, 100), "q2"), torch.randn(7, 100)
    clean = ops.ternary_linear(x, packed)
    x[3, 57] = poison
    got = ops.ternary_linear(x, packed)
    assert got[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(got[others], clean[others])
    with pytest.raises(ValueError, match=r"token \[3\]"):
        ops.ternary_linear(x, packed, check_finite=True)
    assert ops.quantize_ternary_activation(x)[0][3].eq(0).all()


def test_gradients_go_straight_through(level: str) -> None:
    weight, scale = random_weight(12, 40), torch.rand(12) + 0.5
    packed = pack_ternary(weight, "q2", scale=scale)
    x, bias = torch.randn(2, 5, 40, requires_grad=True), torch.randn(12, requires_grad=True)
    grad = torch.randn(2, 5, 12)
    d_x, d_bias = torch.autograd.grad(ops.ternary_linear(x, packed, bias), (x, bias), grad)
    dense = weight.double() * scale.double()[:, None]
    bound = 14 * 2.0**-24 * (grad.double().abs() @ dense.abs())  # twelve products, one rounding of the weight
    assert ((d_x.double() - grad.double() @ dense).abs() <= bound).all()
    assert (
        (d_bias.double() - grad.double().sum((0, 1))).abs() <= 11 * 2.0**-24 * grad.double().abs().sum((0, 1))
    ).all()


@pytest.mark.parametrize("packing", OWN)
def test_the_cpp_oracle_agrees(packing: str) -> None:
    weight, x = random_weight(70, 90), random_codes(3, 90)
    got = torch.ops.tilewright.ternary_matmul_reference(x, pack_ternary(weight, packing).data)
    assert torch.equal(got, oracle(x, weight))


def test_auto_measures_and_answers(level: str) -> None:
    packed = pack_ternary(random_weight(64, 96))
    assert packed.format in ("q2", "t3w")
    assert level in ("avx512", "avx512_bf16") or packed.format == "q2"
    check(random_codes(2, 96), random_weight(64, 96), packed.format)


PACKED = pack_ternary(torch.ones(8, 32, dtype=torch.int8), "q2", scale=0.5)
SCALE = PACKED.scale


def corrupted(at: int, value: int) -> Tensor:
    blob = PACKED.data.clone()
    blob[at] = value
    return blob


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(2, 31, dtype=torch.int8), PACKED.data, 8, 0), r"dimension 1 must be K = 32"),
        ((torch.zeros(2, 32), PACKED.data, 8, 0), r"x has dtype Float, needed Char"),
        ((torch.zeros(2, 32, dtype=torch.int8), PACKED.data, 9, 0), r"out_features = 9.*N = 8"),
        ((torch.zeros(2, 32, dtype=torch.int8), PACKED.data, 8, 1), r"packing = 1.*'q2'"),
        ((torch.zeros(2, 32, dtype=torch.int8), PACKED.data[:-1], 8, 0), r"holds \d+ bytes, its header's shape needs"),
        (
            (torch.zeros(2, 32, dtype=torch.int8), PACKED.data[:10], 8, 0),
            r"10 bytes and is shorter than a packed header.*pack_ternary",
        ),
        ((torch.zeros(2, 32, dtype=torch.int8), PACKED.data.view(2, -1), 8, 0), r"one-dimensional blob"),
        ((torch.zeros(2, 32, dtype=torch.int8), corrupted(0, 0), 8, 0), r"magic"),
        ((torch.zeros(2, 32, dtype=torch.int8), corrupted(10, 1), 8, 0), r"format 1"),
        ((torch.zeros(2, 32, dtype=torch.int8), corrupted(14, 9), 8, 0), r"packing = 9"),
        ((torch.zeros(2, 32, dtype=torch.int8), corrupted(23, 0x7F), 8, 0), r"outside what can be packed"),
        ((torch.zeros((), dtype=torch.int8), PACKED.data, 8, 0), r"x is a scalar"),
    ],
)
def test_bad_input_of_matmul_is_an_error_that_names_it(arguments: tuple, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        torch.ops.tilewright.ternary_matmul(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(2, 31), PACKED.data, SCALE, None, 8, 0), r"dimension 1 must be K = 32"),
        ((torch.zeros(2, 32, dtype=torch.int8), PACKED.data, SCALE, None, 8, 0), r"x has dtype Char.*ternary_matmul"),
        ((torch.zeros(2, 32), PACKED.data, torch.ones(3), None, 8, 0), r"scale has shape \[3\]"),
        ((torch.zeros(2, 32), PACKED.data, SCALE, torch.ones(7), 8, 0), r"bias has shape \[7\]"),
        ((torch.zeros(2, 32), PACKED.data, SCALE, None, 8, 0, torch.int32), r"out_dtype is Int"),
    ],
)
def test_bad_input_of_linear_is_an_error_that_names_it(arguments: tuple, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        torch.ops.tilewright.ternary_linear(*arguments)


@pytest.mark.parametrize("bias", [None, torch.ones(8)])
def test_opcheck(bias: Tensor | None) -> None:
    x = torch.randn(3, 32)
    torch.library.opcheck(torch.ops.tilewright.ternary_linear, (x, PACKED.data, SCALE, bias, 8, 0))
    torch.library.opcheck(
        torch.ops.tilewright.ternary_linear, (x.requires_grad_(), PACKED.data, SCALE, bias, 8, 0, torch.float64)
    )
    torch.library.opcheck(torch.ops.tilewright.ternary_matmul, (x.detach().to(torch.int8), PACKED.data, 8, 0))
    torch.library.opcheck(torch.ops.tilewright.ternary_unpack, (PACKED.data, 8, 32, 0))
    torch.library.opcheck(torch.ops.tilewright.ternary_quantize, (x.detach(),))


def test_compiles_whole_with_dynamic_shapes_and_exports() -> None:
    packed = pack_ternary(random_weight(24, 64), "q2", scale=0.2)

    def model(x: Tensor) -> Tensor:
        return ops.ternary_linear(x * 2, packed) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (1, 3, 8):
        x = torch.randn(tokens, 64)
        assert torch.equal(compiled(x), model(x))
    exported = torch.export.export(
        torch.nn.Sequential(_Wrap(packed)), (torch.randn(4, 64),), dynamic_shapes=({0: torch.export.Dim("T")},)
    )
    x = torch.randn(9, 64)
    assert torch.equal(exported.module()(x), ops.ternary_linear(x, packed))


def test_quantize_ternary_is_the_published_rule() -> None:
    weight = torch.randn(30, 50)
    values, scale = quantize_ternary(weight)
    mean = weight.abs().mean().clamp(min=1e-5)
    assert torch.equal(values.float(), (weight / mean).round().clamp(-1, 1))
    assert float(scale) == float(mean)
    with pytest.raises(ValueError, match="NaN"):
        quantize_ternary(torch.full((2, 2), torch.nan))


class _Wrap(torch.nn.Module):
    def __init__(self, packed: PackedTernary) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        return ops.ternary_linear(x, self.packed)
