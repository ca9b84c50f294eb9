# SPDX-License-Identifier: Apache-2.0
"""Index encoding, the table-lookup product, the weight stream and the buffer's addresses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from edge_inputs import POINT_IDS, POINTS

from tilewright import ops
from tilewright.edge import contract as c
from tilewright.edge.contract.stream import paper_place
from tilewright.edge.contract.weights import accumulate, digit_table
from tilewright.formats import pack_ternary


@pytest.mark.parametrize("tiling", POINTS, ids=POINT_IDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 3), (33, 85), (64, 168), (10, 84)])
def test_product_is_the_integer_product(rng: np.random.Generator, tiling: c.Tiling, outputs: int, inputs: int) -> None:
    weight = rng.integers(-1, 2, (outputs, inputs)).astype(np.int8)
    x = rng.choice(np.array([-128, -127, -1, 0, 1, 127], np.int8), (3, inputs))
    packed = c.pack_tlmm(weight, tiling)
    assert np.array_equal(packed.unpack(), weight)
    assert np.array_equal(c.tlmm(x, packed), accumulate(x, weight))
    other = ops.ternary_matmul(torch.from_numpy(x), pack_ternary(torch.from_numpy(weight)))
    assert np.array_equal(c.tlmm(x, packed), other.numpy())


def test_sums_that_overflow_int16_are_right() -> None:
    """All weights one, all activations 127, 4096 inputs: 128 pair products added in int16 give -528,384."""
    weight = np.ones((4, 4096), np.int8)
    x = np.full((1, 4096), 127, np.int8)
    assert (c.tlmm(x, c.pack_tlmm(weight)) == 520192).all()
    pairs = (x.astype(np.int32) * weight[:1]).reshape(-1, 2).sum(-1)
    # A lane of such a kernel: products against digits w + 1, added 128 at a time before they are widened.
    chain = ((pairs * 2).reshape(-1, 128).sum(-1) + 32768) % 65536 - 32768
    assert chain.sum() - x.astype(np.int32).sum() == -528384


def test_all_codes_in_their_order() -> None:
    digits = digit_table(c.Tiling())
    assert digits.shape == (32, 3)
    assert digits[0].tolist() == [-1, -1, -1]
    assert digits[1].tolist() == [0, -1, -1], "the first input is the lowest digit"
    assert not digits[13].any()
    assert not digits[27:].any()
    assert np.array_equal(digits[26::-1], -digits[:27])


@pytest.mark.parametrize("tiling", POINTS, ids=POINT_IDS)
def test_words_and_beats_carry_the_weights(rng: np.random.Generator, tiling: c.Tiling) -> None:
    packed = c.pack_tlmm(rng.integers(-1, 2, (37, 50)).astype(np.int8), tiling)
    again = c.TlmmWeights.from_words(packed.words(), 37, 50, tiling)
    assert np.array_equal(again.indices, packed.indices)
    norm = rng.standard_normal(50).astype(np.float16)
    for weights in (norm, None):
        beats = c.beats_of(packed, weights)
        count = 0 if weights is None else 50
        found, norms = c.weights_of(beats, 37, 50, tiling, count)
        assert np.array_equal(found.indices, packed.indices)
        assert norms.tolist() == ([] if weights is None else norm.tolist())
        with pytest.raises(ValueError, match="beats, needed"):
            c.weights_of(beats[:-1], 37, 50, tiling, count)


def test_the_papers_stream_has_five_vectors_a_beat() -> None:
    assert c.vectors_per_beat(c.Tiling()) == 5
    packed = c.pack_tlmm(np.zeros((16, 84), np.int8))
    assert c.beats_of(packed).shape == (4, 96)
    assert (packed.indices == 13).all()


@pytest.mark.parametrize("tiling", POINTS, ids=POINT_IDS)
def test_neighbours_are_one_cycle_and_no_address_twice(tiling: c.Tiling) -> None:
    blocks, outputs = 3, 21
    places = [
        [c.buffer_place(b, o, outputs, tiling) for o in range(tiling.padded_outputs(outputs))] for b in range(blocks)
    ]
    flat = list(itertools.chain.from_iterable(places))
    assert len(set(flat)) == len(flat)
    for row in places:
        for step in range(0, len(row), tiling.q):
            banks = [bank for bank, _ in row[step : step + tiling.q]]
            assert max(banks.count(bank) for bank in banks) == 2, "two ports a bank"


def test_the_papers_map_needs_the_same_banks() -> None:
    """Wide and tall matrices share its buffer; each address is aligned and used once."""
    tiling = c.Tiling(3, 4, 4, 2)
    width, ffn = 24, 40
    for tall in (False, True):
        places = {
            paper_place(row, column, width, ffn, tiling, tall=tall)
            for row in range(0, ffn if tall else width, tiling.block)
            for column in range(width if tall else ffn)
        }
        rows = -(-(ffn if tall else width) // tiling.block)
        assert len(places) == rows * (width if tall else ffn)


def test_corrupt_indices_are_reported_and_read_zero(rng: np.random.Generator) -> None:
    packed = c.pack_tlmm(np.ones((16, 84), np.int8))
    packed.indices[0, 3, 5] = 29
    status = c.StatusRegister()
    x = rng.integers(-127, 128, (1, 84)).astype(np.int8)
    got = c.tlmm(x, packed, status)
    assert status.value == c.Status.BAD_INDEX
    assert got[0, 3] == x.sum() - x[0, 15:18].sum()


def test_bad_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight\[1, 0\] = 2"):
        c.pack_tlmm(np.array([[0, 1], [2, 0]], np.int8))
    with pytest.raises(ValueError, match="float32"):
        c.pack_tlmm(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="none of them 0"):
        c.pack_tlmm(np.zeros((0, 2), np.int8))
    with pytest.raises(ValueError, match="t = 0"):
        c.Tiling(t=0)
    with pytest.raises(ValueError, match="holds no vector"):
        c.beats_of(c.pack_tlmm(np.zeros((1, 1), np.int8)), beat_bits=128)
