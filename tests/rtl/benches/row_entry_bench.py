# SPDX-License-Identifier: Apache-2.0
"""row_entry against the contract's Python: blocks of activations, and their scales."""

from __future__ import annotations

import os

import cocotb
import numpy as np
from cocotb.triggers import ReadOnly, RisingEdge
from numpy.typing import NDArray
from rms_max_bench import BEATS_MAX, LANES, Half, load, norm_weights, padded, rows, vector
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

from tilewright.edge import contract
from tilewright.edge.contract import NormConstants, StatusRegister

BLOCK = int(os.environ["RTL_G"]) * int(os.environ["RTL_T"])
QUANTIZED = ("quant_clamp", "short_frame", "long_frame")
Case = tuple[Half, float | None]


def wanted(row: Half, eps: float | None, weights: Half, status: StatusRegister | None = None) -> tuple[NDArray, int]:
    """int8 of all blocks, filled up with zeros, and the bits of the row's scale."""
    y, largest = row[None], contract.row_max(row[None], status)
    if eps is not None:
        y, largest = contract.rms_max(y, weights[: len(row)], NormConstants.of(len(row), eps), status)
    values, scale = contract.quantize(y, largest, status)
    return np.concatenate([values[0], np.zeros(-len(row) % BLOCK, np.int8)]), int(scale[0])


class Ports:
    """Sources of a test, its sink of blocks, and the scales that came with their last ones."""

    def __init__(self, dut, pattern: str) -> None:
        self.dut = dut
        self.cmd, self.source = Source(dut, "cmd", pattern), Source(dut, "in", pattern, SEED + 5)
        self.blocks, self.scales = Sink(dut, "block", ("data", "last"), pattern), []
        self.tasks = [cocotb.start_soon(self._watch())]

    async def _watch(self) -> None:
        dut = self.dut
        while True:
            await RisingEdge(dut.clk_i)
            await ReadOnly()
            if dut.block_valid_o.value and dut.block_ready_i.value and dut.block_last_o.value:
                self.scales.append(int(dut.scale_o.value))

    def send(self, given: list[Case], length: int | None = None) -> None:
        """Rows with their eps, None for no norm; ``length`` is how many beats the first row really has."""
        commands, beats = [], []
        for index, (row, eps) in enumerate(given):
            data = padded(row)
            count = length if length and index == 0 else len(data) // LANES
            pieces = np.resize(data, count * LANES).reshape(-1, LANES)
            beats += [{"data": vector(piece), "last": int(i == count - 1)} for i, piece in enumerate(pieces)]
            constants = NormConstants.of(len(row), eps or 0.0)
            commands.append(
                {"norm": int(eps is not None), "beats": len(data) // LANES, "width": len(row), "eps": constants.eps}
            )
        self.tasks += [cocotb.start_soon(self.cmd.send(commands)), cocotb.start_soon(self.source.send(beats))]

    async def take(self, width: int) -> NDArray[np.int8]:
        """Blocks of one row."""
        count = -(-width // BLOCK)
        got = await self.blocks.take(count, 60 * (width + 120))
        assert [beat["last"] for beat in got] == [0] * (count - 1) + [1]
        return np.frombuffer(b"".join(beat["data"].to_bytes(BLOCK, "little") for beat in got), np.int8)

    async def check(self, given: list[Case], weights: Half, status: StatusRegister | None = None) -> None:
        """What comes next is these rows."""
        for index, (row, eps) in enumerate(given):
            values, scale = wanted(row, eps, weights, status)
            what = f"row {index}, {len(row)} wide, eps {eps}"
            np.testing.assert_array_equal(await self.take(len(row)), values, err_msg=what)
            assert self.scales.pop(0) == scale, what


@cocotb.test()
@cocotb.parametrize(pattern=PATTERNS)
async def rows_equal_the_contract(dut, pattern):
    """Every kind of row with and without a norm, in turn, back to back; and the status of all."""
    draw = np.random.default_rng(SEED)
    await reset(dut)
    weights = norm_weights(draw, BEATS_MAX * LANES)
    await load(dut, weights)
    given = [case for row, eps in rows(draw) for case in ((row, None), (row, eps))]
    ports, status = Ports(dut, pattern), StatusRegister()
    ports.send(given)
    await ports.check(given, weights, status)
    assert bool(dut.saturated_o.value) == (contract.Status.SATURATED in status.value)
    for name in ("nonfinite", *QUANTIZED):
        assert not getattr(dut, f"{name}_o").value, name


@cocotb.test()
async def widths_around_a_block_and_a_beat(dut):
    """One block more or less, one lane more or less, a row of one value beside the longest."""
    draw = np.random.default_rng(SEED + 1)
    await reset(dut)
    most = BEATS_MAX * LANES
    weights = norm_weights(draw, most)
    await load(dut, weights)
    around = {near + step for near in (LANES, BLOCK, 2 * BLOCK, most) for step in (-1, 0, 1)} | {1, most}
    widths = [width for size in sorted(w for w in around if 0 < w <= most) for width in (size, most)]
    given = [(draw.standard_normal(w).astype(np.float16), (None, 1e-5)[i // 2 % 2]) for i, w in enumerate(widths)]
    ports = Ports(dut, "often")
    ports.send(given)
    await ports.check(given, weights)


@cocotb.test()
async def not_finite_is_taken_as_the_contract_says(dut):
    """In the row and in the weights; what is behind the row's width comes to no block."""
    wild = np.resize(np.array([np.nan, np.inf, -np.inf, 1.0], np.float16), LANES)
    ones = np.ones(LANES, np.float16)
    for index, (row, weights, eps) in enumerate(((wild, ones, 1e-5), (wild, ones, None), (ones, wild, 1e-5))):
        await reset(dut, running=index > 0)
        await load(dut, weights)
        status = StatusRegister()
        ports = Ports(dut, "half")
        ports.send([(row, eps)])
        await ports.check([(row, eps)], weights, status)
        assert bool(dut.nonfinite_o.value) == (contract.Status.NONFINITE in status.value)


@cocotb.test()
@cocotb.parametrize(eps=(1e-5, None))
async def frames_of_a_wrong_length_are_seen_and_passed(dut, eps):
    """The rows behind a short or a long one are right."""
    draw = np.random.default_rng(SEED)
    beats = min(3, BEATS_MAX)
    row, weights = draw.standard_normal(beats * LANES).astype(np.float16), norm_weights(draw, beats * LANES)
    after = [(row[::-1].copy(), 1e-5), (row, None)]
    for index, length in enumerate((1, beats + 3)):
        await reset(dut, running=index > 0)
        await load(dut, weights)
        ports = Ports(dut, "half")
        ports.send([(row, eps), *after], length)
        await ports.take(min(length, beats) * LANES)
        ports.scales.pop()
        await ports.check(after, weights)
        assert (bool(dut.short_frame_o.value), bool(dut.long_frame_o.value)) == (length < beats, length > beats)


@cocotb.test()
async def a_reset_in_a_row_leaves_nothing_behind(dut):
    """While it is taken in, rooted, scaled, divided for, and while its blocks leave."""
    draw = np.random.default_rng(SEED)
    weights = norm_weights(draw, BEATS_MAX * LANES)
    given = [(draw.standard_normal(BEATS_MAX * LANES).astype(np.float16), eps) for eps in (1e-5, None)]
    await reset(dut)
    for cycles in (2, BEATS_MAX + 2, 2 * BEATS_MAX + 40, 3 * BEATS_MAX + 78, 3 * BEATS_MAX + 100, 4 * BEATS_MAX + 118):
        await load(dut, weights)
        ports = Ports(dut, "always")
        ports.send(given)
        for _ in range(cycles):
            await RisingEdge(dut.clk_i)
        for task in ports.tasks:
            task.cancel()
        dut.cmd_valid_i.value = dut.in_valid_i.value = 0
        await reset(dut, running=True)
        assert not dut.block_valid_o.value
        ports = Ports(dut, "always")
        ports.send(given)
        await ports.check(given, weights)


@cocotb.test()
@cocotb.parametrize(eps=(1e-5, None))
async def a_row_is_quantized_while_the_next_is_normed(dut, eps):
    """Cycles of rows without pauses: the slower of the two, and once the other."""
    draw = np.random.default_rng(SEED)
    weights = norm_weights(draw, BEATS_MAX * LANES)
    await reset(dut)
    await load(dut, weights)
    given = [(draw.standard_normal(BEATS_MAX * LANES).astype(np.float16), eps) for _ in range(4)]
    norm = 3 * BEATS_MAX + 34 + 17 + 24 if eps else BEATS_MAX + 4
    quantize = BEATS_MAX + 31 + 10
    leave = -(-BEATS_MAX * LANES // BLOCK) + 4
    ports = Ports(dut, "always")
    counter = CycleCounter(dut)
    ports.send(given)
    await ports.check(given, weights)
    assert counter.count <= norm + 3 * max(norm, quantize) + quantize + leave
