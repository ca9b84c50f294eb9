# SPDX-License-Identifier: Apache-2.0
"""int4_int8_linear and int4_fp8_linear against exact integers and a float64 oracle that shares no code with them.

Bound. With u = 2^-24, an output is a sum over groups of products that are exact (INT8: integers; FP8: four-bit times
four-bit significands). Every addition, every scaling and the last multiplication rounds once, so by the usual argument
|error| <= n u / (1 - n u) * sum |terms| with n the longest chain of roundings an element passes: the length of a group
(FP8 only), two a group, one a run of groups that share an activation scale, and four at the ends.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright import ops
from tilewright.formats import Int4Weight, pack_codes, per_channel_group, quantize_int4
from tilewright.testing import UNIT_ROUNDOFF, assert_within, isa_level, isa_levels

OFFSETS = ("none", "minimum", "zero")
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: activation format and its options."""

    activation: str
    scale_group: int | None = None

    def run(self, x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
        if self.activation == "int8":
            return ops.int4_int8_linear(x, weight.pack(), bias, scale_group=self.scale_group)
        mode = "fold" if self.activation == "fold" else "exact"
        return ops.int4_fp8_linear(x, weight.pack(), bias, mode=mode)

    def quantized(self, x: Tensor) -> Tensor:
        """x after the activation format, float64 [M, K]."""
        if self.activation == "int8":
            codes, scale = ops.quantize_int8_per_token(x, self.scale_group)
            if self.scale_group is not None:
                scale = scale.repeat_interleave(self.scale_group, -1)[..., : x.shape[-1]]
                return codes.double() * scale.double()
        else:
            codes, scale = ops.quantize_fp8_per_token(x)
        return codes.double() * scale.double()[..., None]


def random_weight(
    rows: int, columns: int, group: int, offset: str = "none", scale_dtype: torch.dtype = torch.float32
) -> Int4Weight:
    groups = -(-columns // group)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scales = (torch.rand(rows, groups) + 0.1).to(scale_dtype)
    offsets = {
        "none": None,
        "minimum": torch.randn(rows, groups).to(scale_dtype),
        "zero": torch.randint(0, 16, (rows, groups), dtype=torch.uint8),
    }[offset]
    return Int4Weight(pack_codes(codes), scales, offsets, (rows, columns), group)


def term_magnitudes(case: Case, x: Tensor, weight: Int4Weight) -> Tensor:
    """sum |terms| of each output: codes and offsets enter separately where the kernel keeps them apart."""
    k, group = weight.shape[1], weight.group_size
    scale = weight.scales.double().repeat_interleave(group, -1)[:, :k]
    codes = weight.unpacked_codes().double()
    if weight.offsets is None:
        magnitude = (codes - 8).abs() * scale
    elif weight.offsets.dtype == torch.uint8:
        magnitude = (codes + weight.offsets.double().repeat_interleave(group, -1)[:, :k]) * scale
    else:
        magnitude = codes * scale + weight.offsets.double().abs().repeat_interleave(group, -1)[:, :k]
    return case.quantized(x).abs() @ magnitude.T / weight.per_tensor_scale


def bound(case: Case, x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    k, group = weight.shape[1], min(weight.group_size, weight.shape[1])
    groups = -(-k // weight.group_size)
    runs = 1 if case.scale_group is None else -(-k // case.scale_group)
    chain = 2 * groups + runs + 4 + (0 if case.activation == "int8" else group)
    magnitude = term_magnitudes(case, x, weight)
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    return chain * UNIT_ROUNDOFF / (1 - chain * UNIT_ROUNDOFF) * magnitude


def oracle(case: Case, x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    dense = weight.dequantize(torch.float64)
    if case.activation == "fold":
        folded = (dense * weight.per_tensor_scale).float().clamp(-448, 448).to(torch.float8_e4m3fn)
        dense = folded.double() / weight.per_tensor_scale
    y = case.quantized(x) @ dense.T
    return y if bias is None else y + bias.double()


def check(case: Case, x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> None:
    got = case.run(x, weight, bias)
    assert_within(got, oracle(case, x, weight, bias), bound(case, x, weight, bias), f"{case}")


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("case", [Case("int8"), Case("int8", 64), Case("fp8")], ids=str)
@pytest.mark.parametrize(("rows", "columns", "group"), [(40, 576, 32), (17, 200, 64), (16, 96, 96)])
def test_kernels_equal_the_float64_oracle(
    level: str, case: Case, offset: str, scale_dtype: torch.dtype, rows: int, columns: int, group: int
) -> None:
    if case.scale_group is not None and case.scale_group % group:
        case = Case("int8", 2 * group)
    weight = random_weight(rows, columns, group, offset, scale_dtype)
    for tokens in (1, 2, 3, 4, 5, 6, 11):
        check(case, torch.randn(tokens, columns), weight, torch.randn(rows))


@pytest.mark.parametrize("scale_dtype", [*SCALE_DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("p", [None, "auto"])
def test_fold_mode_rounds_each_weight_to_e4m3(level: str, scale_dtype: torch.dtype, p: str | None) -> None:
    weight = quantize_int4(torch.randn(24, 288) * 0.02, 128, scale_dtype, p)
    check(Case("fold"), torch.randn(5, 288), weight)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17, 31, 33, 127, 129, 1000])
@pytest.mark.parametrize("case", [Case("int8"), Case("fp8")], ids=str)
def test_ragged_columns_and_rows(level: str, case: Case, columns: int) -> None:
    for rows in (1, 15, 16, 33):
        check(case, torch.randn(3, columns), random_weight(rows, columns, 16, "minimum"))


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    tokens=st.integers(0, 9),
    group=st.sampled_from([16, 32, 48, 64, 128, 304]),
    offset=st.sampled_from(OFFSETS),
    activation=st.sampled_from(["int8", "fp8"]),
    level_name=st.sampled_from(isa_levels()),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_any_shape(
    rows: int, columns: int, tokens: int, group: int, offset: str, activation: str, level_name: str, seed: int
) -> None:
    torch.manual_seed(seed)
    with isa_level(level_name):
        check(Case(activation), torch.randn(tokens, columns) * 3, random_weight(rows, columns, group, offset))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("columns", [576, 11008])
def test_int8_products_of_one_sign_are_exact_integers(level: str, offset: str, columns: int) -> None:
    """All codes 15, all activations the largest: the place where narrow accumulators wrap. One group spans the row, so
    a 16-bit or saturating sum anywhere shows; sums up to 2^24 are exact in float32."""
    group = per_channel_group(columns)
    codes = torch.full((32, columns), 15, dtype=torch.uint8)
    offsets = {"none": None, "minimum": torch.zeros(32, 1), "zero": torch.zeros(32, 1, dtype=torch.uint8)}[offset]
    weight = Int4Weight(pack_codes(codes), torch.ones(32, 1), offsets, (32, columns), group)
    code = 7 if offset == "none" else 15
    for sign in (1.0, -1.0):
        got = ops.int4_int8_linear(torch.full((3, columns), 127.0 * sign), weight.pack())
        exact = torch.full((3, 32), sign * 127 * code * columns)
        assert_within(got, exact, exact.abs() * UNIT_ROUNDOFF, "integer sum")


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("scale_group", [None, 64])
def test_int8_path_gives_the_same_bits_at_every_level(offset: str, scale_group: int | None) -> None:
    weight = random_weight(70, 500, 32, offset, torch.float16)
    x = torch.randn(13, 500)
    results = []
    for name in isa_levels():
        with isa_level(name):
            results.append(Case("int8", scale_group).run(x, weight, torch.ones(70)))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("case", [Case("int8"), Case("int8", 64), Case("fp8"), Case("fold")], ids=str)
def test_a_token_does_not_depend_on_its_neighbours(level: str, case: Case) -> None:
    weight = quantize_int4(torch.randn(50, 160), 32)
    x = torch.randn(23, 160)
    together = case.run(x, weight)
    alone = torch.cat([case.run(row[None], weight) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("case", [Case("int8"), Case("fp8")], ids=str)
def test_thread_count_does_not_change_a_bit(case: Case) -> None:
    weight, x = random_weight(333, 256, 32, "minimum"), torch.randn(40, 256)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("case", [Case("int8"), Case("int8", 32), Case("fp8"), Case("fold")], ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_spoils_only_itself(level: str, case: Case, poison: float) -> None:
    weight, x = quantize_int4(torch.randn(20, 100), 32), torch.randn(7, 100)
    clean = case.run(x, weight)
    x[3, 57] = poison
    got = case.run(x, weight)
    assert got[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("case", [Case("int8"), Case("int8", 16), Case("fp8")], ids=str)
def test_zero_tokens_give_the_bias(level: str, case: Case) -> None:
    bias = torch.randn(30)
    got = case.run(torch.zeros(4, 48), random_weight(30, 48, 16, "minimum"), bias)
    assert torch.equal(got, bias.expand(4, 30))


@pytest.mark.parametrize("case", [Case("int8"), Case("fp8")], ids=str)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_very_small_and_very_large_tokens(level: str, case: Case, scale: float) -> None:
    """Magnitudes whose scale is subnormal lose relative accuracy as float32 does; the result stays finite."""
    weight, x = random_weight(16, 64, 16), torch.randn(3, 64) * scale
    if scale > 1e-38:
        check(case, x, weight)
    else:
        assert torch.isfinite(case.run(x, weight)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_input_dtype_is_the_output_dtype_unless_asked(dtype: torch.dtype) -> None:
    packed, x = random_weight(8, 32, 16).pack(), torch.randn(2, 32).to(dtype)
    assert ops.int4_int8_linear(x, packed).dtype == dtype
    assert ops.int4_fp8_linear(x, packed, out_dtype=torch.float32).dtype == torch.float32
    assert torch.equal(ops.int4_int8_linear(x, packed), ops.int4_int8_linear(x.float(), packed).to(dtype))


def test_strided_and_batched_inputs_equal_contiguous_ones() -> None:
    packed = random_weight(20, 48, 16, "minimum").pack()
    wide = torch.randn(3, 5, 96)
    strided, transposed = wide[..., ::2], torch.randn(48, 6).T
    assert torch.equal(ops.int4_int8_linear(strided, packed), ops.int4_int8_linear(strided.contiguous(), packed))
    assert torch.equal(ops.int4_fp8_linear(transposed, packed), ops.int4_fp8_linear(transposed.contiguous(), packed))
    assert ops.int4_int8_linear(strided, packed).shape == (3, 5, 20)
    assert ops.int4_int8_linear(torch.randn(48), packed).shape == (20,)


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48)])
def test_no_tokens_give_an_empty_result(level: str, shape: tuple[int, ...]) -> None:
    got = ops.int4_int8_linear(torch.randn(shape), random_weight(20, 48, 16).pack())
    assert got.shape == (*shape[:-1], 20)


def test_no_rows_give_an_empty_result(level: str) -> None:
    weight = Int4Weight(torch.empty(0, 24, dtype=torch.uint8), torch.empty(0, 3), None, (0, 48), 16)
    assert ops.int4_fp8_linear(torch.randn(4, 48), weight.pack()).shape == (4, 0)


@pytest.mark.parametrize(
    ("activation", "offset"), [("fold", "none"), *((a, o) for a in ("int8", "fp8") for o in OFFSETS)]
)
def test_the_cpp_oracle_agrees_with_the_python_oracle(activation: str, offset: str) -> None:
    case, weight, x = Case(activation), random_weight(9, 80, 32, offset), torch.randn(3, 80)
    got = torch.ops.tilewright.int4_linear_reference(
        x, weight.pack().data, None, 9, 0, activation != "int8", activation == "fold"
    )
    want = oracle(case, x, weight, None)
    assert_within(got, want, 1e-12 * term_magnitudes(case, x, weight), "C++ oracle")


BLOB = quantize_int4(torch.ones(8, 32), 16).pack()


def corrupted(at: int, value: int) -> Tensor:
    blob = BLOB.data.clone()
    blob[at] = value
    return blob


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.randn(2, 31), BLOB.data, None, 8), r"dimension 1 must be K = 32"),
        ((torch.randn(2, 32), BLOB.data, None, 9), r"out_features = 9.*N = 8"),
        ((torch.randn(2, 32), BLOB.data[:-1], None, 8), r"holds \d+ bytes, its header's shape needs \d+"),
        ((torch.randn(2, 32), BLOB.data[:10], None, 8), r"fewer than the 64"),
        ((torch.randn(2, 32), BLOB.data.float(), None, 8), r"weight has dtype Float"),
        ((torch.randn(2, 32), BLOB.data.view(2, -1), None, 8), r"one-dimensional blob"),
        ((torch.randn(2, 32), corrupted(0, 0), None, 8), r"magic"),
        ((torch.randn(2, 32), corrupted(8, 9), None, 8), r"version 9"),
        ((torch.randn(2, 32), corrupted(10, 7), None, 8), r"format 7"),
        ((torch.randn(2, 32), corrupted(12, 7), None, 8), r"unknown scale"),
        ((torch.randn(2, 32), corrupted(23, 0x7F), None, 8), r"outside what can be packed"),
        ((torch.randn(2, 32), corrupted(32, 3), None, 8), r"group = 3"),
        ((torch.randn(2, 32), BLOB.data, torch.ones(7), 8), r"bias has shape \[7\]"),
        ((torch.randn(2, 32), BLOB.data, torch.ones(8, dtype=torch.int64), 8), r"bias has dtype"),
        ((torch.ones(2, 32, dtype=torch.int32), BLOB.data, None, 8), r"x has dtype Int"),
        ((torch.randn(()), BLOB.data, None, 8), r"x is a scalar"),
        ((torch.randn(2, 32), BLOB.data, None, 8, 24), r"scale_group = 24"),
    ],
)
def test_bad_input_is_an_error_that_names_it(arguments: tuple, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        torch.ops.tilewright.int4_int8_linear(*arguments)


def test_fold_refuses_weights_with_offsets_and_unknown_modes() -> None:
    packed = random_weight(8, 32, 16, "minimum").pack()
    with pytest.raises(RuntimeError, match="mode='exact'"):
        ops.int4_fp8_linear(torch.randn(1, 32), packed, mode="fold")
    with pytest.raises(ValueError, match="'round'"):
        ops.int4_fp8_linear(torch.randn(1, 32), packed, mode="round")


@pytest.mark.parametrize("bias", [None, torch.ones(8)])
def test_opcheck(bias: Tensor | None) -> None:
    x = torch.randn(3, 32)
    torch.library.opcheck(torch.ops.tilewright.int4_int8_linear, (x, BLOB.data, bias, 8))
    torch.library.opcheck(torch.ops.tilewright.int4_int8_linear, (x, BLOB.data, bias, 8, 16))
    torch.library.opcheck(torch.ops.tilewright.int4_fp8_linear, (x, BLOB.data, bias, 8, False))
    torch.library.opcheck(torch.ops.tilewright.int4_fp8_linear, (x.bfloat16(), BLOB.data, bias, 8, True))


def test_compiles_whole_with_dynamic_shapes_and_exports() -> None:
    packed = random_weight(24, 64, 32).pack()

    def model(x: Tensor) -> Tensor:
        return ops.int4_int8_linear(x * 2, packed) + ops.int4_fp8_linear(x, packed)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (1, 3, 8):
        x = torch.randn(tokens, 64)
        assert torch.equal(compiled(x), model(x))
    exported = torch.export.export(
        torch.nn.Sequential(_Wrap(packed)), (torch.randn(4, 64),), dynamic_shapes=({0: torch.export.Dim("T")},)
    )
    x = torch.randn(9, 64)
    assert torch.equal(exported.module()(x), ops.int4_int8_linear(x, packed))


class _Wrap(torch.nn.Module):
    def __init__(self, packed: object) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        return ops.int4_int8_linear(x, self.packed)
