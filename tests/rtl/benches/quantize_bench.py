# SPDX-License-Identifier: Apache-2.0
"""quantize against the contract's Python."""

from __future__ import annotations

import os

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

from tilewright.edge import contract

LANES = int(os.environ["RTL_LANES"])


def vector(values: np.ndarray) -> int:
    return int.from_bytes(np.ascontiguousarray(values).tobytes(), "little")


def rows(draw: np.random.Generator) -> list[np.ndarray]:
    """Float16 rows: ordinary, wide ranges, ties, subnormal, zero, extremes of one sign, one beat."""
    wide = draw.standard_normal(6 * LANES) * 2.0 ** draw.integers(-24, 15, 6 * LANES)
    ties = np.concatenate([[127.0], np.arange(-126, 127) + 0.5, np.zeros(-254 % LANES)])
    found = [draw.standard_normal(4 * LANES), wide, ties, draw.standard_normal(2 * LANES) * 2.0**-22]
    found += [np.zeros(LANES), np.full(2 * LANES, 65504.0), np.full(LANES, -65504.0), draw.standard_normal(LANES)]
    return [row.clip(-65504, 65504).astype(np.float16) for row in found]


async def run(dut, given: list[tuple[np.ndarray, int]], pattern: str) -> tuple[list[np.ndarray], int]:
    maxima, source = Source(dut, "max", pattern), Source(dut, "in", pattern, SEED + 7)
    sink = Sink(dut, "out", ("data", "last"), pattern)
    await RisingEdge(dut.clk_i)
    counter = CycleCounter(dut)
    cocotb.start_soon(maxima.send(largest for _, largest in given))
    beats = [
        {"data": vector(piece), "last": int(i == len(row) // LANES - 1)}
        for row, _ in given
        for i, piece in enumerate(row.reshape(-1, LANES))
    ]
    cocotb.start_soon(source.send(beats))
    found = []
    for row, largest in given:
        got = await sink.take(len(row) // LANES, 40 * (len(row) + 64))
        assert [beat["last"] for beat in got] == [0] * (len(got) - 1) + [1]
        assert int(dut.scale_o.value) == max(largest, 0x00A8)
        data = b"".join(beat["data"].to_bytes(LANES, "little") for beat in got)
        found.append(np.frombuffer(data, np.int8))
    return found, counter.count


@cocotb.test()
@cocotb.parametrize(pattern=PATTERNS)
async def rows_equal_the_contract(dut, pattern):
    """Every kind of row, back to back."""
    draw = np.random.default_rng(SEED)
    await reset(dut)
    given = [(row, int(contract.row_max(row[None])[0])) for row in rows(draw)]
    found, _ = await run(dut, given, pattern)
    for (row, largest), got in zip(given, found, strict=True):
        np.testing.assert_array_equal(got, contract.quantize(row[None], np.array([largest]))[0][0])
    assert not dut.clamped_o.value
    assert not dut.nonfinite_o.value


@cocotb.test()
async def a_maximum_that_is_too_small_clamps(dut):
    """A broken producer is seen in the status, and gives 127."""
    await reset(dut)
    row = np.array([1.0, -2.0, 0.5, 1e-4] * LANES, np.float16)[: 4 * LANES]
    found, _ = await run(dut, [(row, 0x3800)], "always")
    np.testing.assert_array_equal(found[0], contract.quantize(row[None], np.array([0x3800]))[0][0])
    assert dut.clamped_o.value


@cocotb.test()
async def not_finite_is_taken_as_the_contract_says(dut):
    """NaN is zero, an infinity the largest number."""
    await reset(dut)
    row = np.resize(np.array([np.nan, np.inf, -np.inf, 1.0], np.float16), 2 * LANES)
    largest = int(contract.row_max(row[None])[0])
    found, _ = await run(dut, [(row, largest)], "half")
    np.testing.assert_array_equal(found[0], contract.quantize(row[None], np.array([largest]))[0][0])
    assert dut.nonfinite_o.value


@cocotb.test()
async def a_beat_a_cycle_after_the_division(dut):
    """Without pauses a row takes its beats, the division and the pipeline."""
    await reset(dut)
    row = np.ones(64 * LANES, np.float16)
    _, taken = await run(dut, [(row, 0x3C00)], "always")
    assert taken <= 64 + 31 + 10
