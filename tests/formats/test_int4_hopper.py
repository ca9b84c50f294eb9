# SPDX-License-Identifier: Apache-2.0
"""The layout of INT4 weights that the Hopper kernels read, against its description in csrc/format/int4_hopper.h."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright import ops
from tilewright.formats import Int4Weight, PackedInt4, pack_codes
from tilewright.nn import W4A8Linear

HEADER, ROWS, COLUMNS, CODE_BYTES = 256, 64, 128, 64 * 128 // 2


def weight_of(rows: int, columns: int, group: int, offset: str, dtype: torch.dtype) -> Int4Weight:
    groups = -(-columns // group)
    codes = torch.randint(1 if offset == "none" else 0, 16, (rows, columns), dtype=torch.uint8)
    offsets = {
        "none": None,
        "minus8": None,
        "minimum": torch.randn(rows, groups).to(dtype),
        "zero": torch.randint(0, 256, (rows, groups), dtype=torch.uint8),
    }[offset]
    return Int4Weight(pack_codes(codes), torch.randn(rows, groups).to(dtype), offsets, (rows, columns), group)


@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 400),
    group=st.sampled_from([16, 32, 48, 64, 128, 192, 400]),
    offset=st.sampled_from(["none", "minus8", "minimum", "zero"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_repacking_there_and_back_changes_no_byte(
    rows: int, columns: int, group: int, offset: str, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    packed = weight_of(rows, columns, group, offset, dtype).pack()
    there = packed.repacked("cuda")
    assert there.layout > 0
    assert there.repacked("cuda") is not packed
    back = there.repacked("cpu")
    assert back.layout == 0
    assert torch.equal(back.data, packed.data)


def chunk_of(packed: PackedInt4, row: int, column: int, chunk_bytes: int) -> torch.Tensor:
    tiles = -(-packed.shape[1] // COLUMNS)
    first = HEADER + (row // ROWS * tiles + column // COLUMNS) * chunk_bytes
    return packed.data[first : first + chunk_bytes]


def word_of(chunk: torch.Tensor, row: int, column: int) -> int:
    """The word that a thread reads for an element, from the description alone."""
    row, column = row % ROWS, column % COLUMNS
    step, within = column // 32, column % 32
    thread = row // 16 * 32 + row % 8 * 4 + within % 16 // 4
    at = step // 2 * 2048 + thread * 16 + (step % 2 * 2 + row % 16 // 8) * 4
    return int.from_bytes(bytes(chunk[at : at + 4].tolist()), "little")


@pytest.mark.parametrize("offset", ["none", "minus8"])
def test_three_operations_turn_a_word_into_e4m3_bytes(offset: str) -> None:
    """A byte is the code times 2^-9, read by torch's e4m3: q = u - 8 for signed words, u for the others."""
    weight = weight_of(70, 200, 64, offset, torch.bfloat16)
    weight.codes[0, 0] &= 0xF0 if offset == "minus8" else 0xFF  # a -8 for certain
    packed = weight.pack().repacked("cuda")
    chunk_bytes = CODE_BYTES + 2 * ROWS * 2  # two scales of 2 bytes a row
    codes = weight.unpacked_codes()
    for row, column in [(0, 0), (5, 3), (8, 17), (63, 127), (64, 128), (69, 199), (31, 95), (40, 48)]:
        word = word_of(chunk_of(packed, row, column, chunk_bytes), row, column)
        high = column % 32 >= 16
        if offset == "none":
            rotated = (word >> 4 | word << 28) & 0xFFFFFFFF if high else word
            byte = rotated & 0x87878787
        else:
            byte = (word >> 4 if high else word) & 0x0F0F0F0F
        value = torch.tensor([byte >> 8 * (column % 4) & 0xFF], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        expected = int(codes[row, column]) - (8 if offset == "none" else 0)
        assert float(value) * 512 == expected, (row, column)


def test_scales_of_rows_that_a_thread_holds_lie_side_by_side() -> None:
    weight = weight_of(64, 256, 32, "none", torch.float32)
    packed = weight.pack().repacked("cuda")
    chunk_bytes = CODE_BYTES + 4 * ROWS * 4
    for row, column in [(0, 0), (8, 40), (23, 127), (63, 255)]:
        numbers = chunk_of(packed, row, column, chunk_bytes)[CODE_BYTES:].clone().view(torch.float32).view(4, ROWS)
        order = (row // 16 * 8 + row % 8) * 2 + row % 16 // 8
        assert numbers[column % COLUMNS // 32, order] == weight.scales[row, column // 32]


def test_a_blob_of_the_other_layout_is_refused() -> None:
    packed = weight_of(8, 32, 16, "none", torch.float32).pack()
    other = packed.repacked("cuda")
    with pytest.raises(RuntimeError, match="holds packed format 5, needed 1"):
        torch.ops.tilewright.int4_fp8_linear(torch.randn(1, 32), other.data, None, 8, False)
    with pytest.raises(RuntimeError, match=r"PackedInt4.to\('cpu'\)"):
        torch.ops.tilewright.int4_fp8_linear(torch.randn(1, 32), other.data, None, 8, False, other.layout)
    with pytest.raises(RuntimeError, match=r"needs \d+"):
        torch.ops.tilewright.int4_repack(other.data[:-128].clone(), False)
    with pytest.raises(RuntimeError, match="header of 64 bytes"):
        torch.ops.tilewright.int4_repack(other.data[:10].clone(), True)


def test_tokens_are_rounded_ahead_on_a_gpu_only() -> None:
    packed = weight_of(8, 32, 16, "none", torch.float32).pack().repacked("cuda")
    with pytest.raises(RuntimeError, match="pass x to it"):
        ops.fp8_tokens(torch.randn(1, 32), packed)


def test_a_layer_moved_to_where_it_is_keeps_its_blob() -> None:
    layer = W4A8Linear(weight_of(70, 48, 16, "minimum", torch.float32))
    blob = layer.packed.clone()
    layer.to("cpu").to(torch.bfloat16)
    assert layer.packed.dtype == torch.uint8
    assert torch.equal(layer.packed, blob)
    assert torch.equal(layer.state_dict()["packed"], blob)
