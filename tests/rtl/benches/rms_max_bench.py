# SPDX-License-Identifier: Apache-2.0
"""rms_max against the contract's Python."""

from __future__ import annotations

import math
import os

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from numpy.typing import NDArray
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

from tilewright.edge import contract
from tilewright.edge.contract import NormConstants, StatusRegister
from tilewright.edge.contract.rows import MAX_WIDTH

LANES, BEATS_MAX = int(os.environ["RTL_LANES"]), int(os.environ["RTL_ROWBEATSMAX"])
Half = NDArray[np.float16]


def padded(values: Half) -> Half:
    return np.concatenate([values, np.zeros(-len(values) % LANES, np.float16)])


def vector(values: NDArray) -> int:
    return int.from_bytes(np.ascontiguousarray(values).tobytes(), "little")


def rows(draw: np.random.Generator) -> list[tuple[Half, float]]:
    """Rows and their eps: wide ranges, subnormal, zero, extremes of one sign, one value; eps 0 and large."""
    most = BEATS_MAX * LANES
    wide = draw.standard_normal(most) * 2.0 ** draw.integers(-24, 15, most)
    tiny = np.zeros(min(3 * LANES, most))
    tiny[0] = 2.0**-24
    found = [
        (draw.standard_normal(most - 1), 1e-5),
        (wide, 1e-6),
        (draw.standard_normal(min(5, most)) * 2.0**-20, 1e-5),
        (np.zeros(min(LANES, most)), 1e-5),
        (np.zeros(1), 0.0),
        (np.full(most, 65504.0), 1e-5),
        (np.full(most, -65504.0), 0.0),
        (np.full(1, 3.0), 0.4),
        (tiny, 0.0),
        (np.full(most, 2.0**-24), 0.0),
        (draw.standard_normal(2) * 2.0**-8, 0.2),
    ]
    return [(row.clip(-65504, 65504).astype(np.float16), eps) for row, eps in found]


def norm_weights(draw: np.random.Generator, width: int) -> Half:
    return (draw.standard_normal(width) * 2.0 ** draw.integers(-10, 4, width)).astype(np.float16)


async def load(dut, weights: Half) -> None:
    """The norm's weights, one a cycle."""
    dut.w_start_i.value = 1
    await RisingEdge(dut.clk_i)
    dut.w_start_i.value = 0
    dut.w_valid_i.value = 1
    for value in weights.view(np.uint16):
        dut.w_data_i.value = int(value)
        await RisingEdge(dut.clk_i)
    dut.w_valid_i.value = 0


class Ports:
    """Sources and sinks of a test."""

    def __init__(self, dut, pattern: str) -> None:
        self.dut = dut
        self.cmd, self.source = Source(dut, "cmd", pattern), Source(dut, "in", pattern, SEED + 5)
        self.out, self.max = Sink(dut, "out", ("data", "last"), pattern), Sink(dut, "max", ("data",), pattern, SEED + 3)

    def send(self, given: list[tuple[Half, float | None]], length: int | None = None) -> None:
        """Rows with their eps, None for no norm; ``length`` is how many beats the first row really has."""
        commands, beats = [], []
        for index, (row, eps) in enumerate(given):
            data = padded(row)
            constants = NormConstants.of(len(row), eps or 0.0)
            commands.append(
                {"norm": int(eps is not None), "beats": len(data) // LANES, "width": len(row), "eps": constants.eps}
            )
            count = length if length and index == 0 else len(data) // LANES
            pieces = np.resize(data, count * LANES).reshape(-1, LANES)
            beats += [{"data": vector(piece), "last": int(i == count - 1)} for i, piece in enumerate(pieces)]
        self.tasks = [cocotb.start_soon(self.cmd.send(commands)), cocotb.start_soon(self.source.send(beats))]

    async def take(self, beats: int) -> tuple[Half, int]:
        """A row and its maximum."""
        got = await self.out.take(beats, 100 * (beats + 20) + 1500)
        assert [beat["last"] for beat in got] == [0] * (beats - 1) + [1]
        data = b"".join(beat["data"].to_bytes(2 * LANES, "little") for beat in got)
        return np.frombuffer(data, np.float16), (await self.max.take(1, 200))[0]["data"]


def wanted(row: Half, eps: float | None, weights: Half, status: StatusRegister) -> tuple[Half, int]:
    if eps is None:
        return row, int(contract.row_max(row[None], status)[0])
    y, largest = contract.rms_max(row[None], weights[: len(row)], NormConstants.of(len(row), eps), status)
    return y[0], int(largest[0])


def check(got: tuple[Half, int], want: tuple[Half, int], what: str) -> None:
    np.testing.assert_array_equal(got[0].view(np.uint16), padded(want[0]).view(np.uint16), err_msg=what)
    assert got[1] == want[1], what


@cocotb.test()
@cocotb.parametrize(pattern=PATTERNS)
async def rows_equal_the_contract(dut, pattern):
    """Every kind of row with and without a norm, in turn, back to back."""
    draw = np.random.default_rng(SEED)
    await reset(dut)
    weights = norm_weights(draw, BEATS_MAX * LANES)
    given = [case for row, eps in rows(draw) for case in ((row, eps), (row, None))]
    await load(dut, weights)
    ports, status = Ports(dut, pattern), StatusRegister()
    ports.send(given)
    for index, (row, eps) in enumerate(given):
        got = await ports.take(len(padded(row)) // LANES)
        check(got, wanted(row, eps, weights, status), f"row {index}, eps {eps}")
    assert bool(dut.saturated_o.value) == (contract.Status.SATURATED in status.value)
    for name in ("nonfinite", "short_frame", "long_frame"):
        assert not getattr(dut, f"{name}_o").value, name


@cocotb.test()
async def not_finite_is_taken_as_the_contract_says(dut):
    """In the row, with and without a norm, and in the weights."""
    wild = np.resize(np.array([np.nan, np.inf, -np.inf, 1.0], np.float16), LANES)
    ones = np.ones(LANES, np.float16)
    for index, (row, weights, eps) in enumerate(((wild, ones, 1e-5), (wild, ones, None), (ones, wild, 1e-5))):
        await reset(dut, running=index > 0)
        await load(dut, weights)
        ports = Ports(dut, "half")
        ports.send([(row, eps)])
        check(await ports.take(1), wanted(row, eps, weights, StatusRegister()), f"case {index}")
        assert dut.nonfinite_o.value


@cocotb.test()
async def frames_of_a_wrong_length_are_seen_and_passed(dut):
    """A short row ends where it ends, of a long one the rest is dropped; the next row is right."""
    draw = np.random.default_rng(SEED)
    beats = min(3, BEATS_MAX)
    row, weights = draw.standard_normal(beats * LANES).astype(np.float16), norm_weights(draw, beats * LANES)
    for index, (length, eps) in enumerate(((beats + 2, 1e-5), (beats + 2, None), (1, 1e-5), (1, None))):
        if length == beats:
            continue
        await reset(dut, running=index > 0)
        await load(dut, weights)
        ports = Ports(dut, "half")
        ports.send([(row, eps), (row, 1e-5)], length)
        await ports.take(min(length, beats))
        check(await ports.take(beats), wanted(row, 1e-5, weights, StatusRegister()), "the row after it")
        assert (dut.long_frame_o if length > beats else dut.short_frame_o).value
        assert int(dut.short_frame_o.value) + int(dut.long_frame_o.value) == 1


@cocotb.test()
async def a_reset_in_a_row_leaves_nothing_behind(dut):
    """At several moments of a row with a norm."""
    draw = np.random.default_rng(SEED)
    row, weights = draw.standard_normal(BEATS_MAX * LANES).astype(np.float16), norm_weights(draw, BEATS_MAX * LANES)
    await reset(dut)
    for cycles in (2, BEATS_MAX, BEATS_MAX + 12, 2 * BEATS_MAX + 40, 2 * BEATS_MAX + 75):
        await load(dut, weights)
        ports = Ports(dut, "always")
        ports.send([(row, 1e-5)])
        for _ in range(cycles):
            await RisingEdge(dut.clk_i)
        for task in ports.tasks:
            task.cancel()
        dut.cmd_valid_i.value = dut.in_valid_i.value = 0
        await reset(dut, running=True)
        assert not dut.out_valid_o.value
        assert not dut.max_valid_o.value
        ports = Ports(dut, "always")
        ports.send([(row, 1e-5)])
        check(await ports.take(BEATS_MAX), wanted(row, 1e-5, weights, StatusRegister()), f"after {cycles}")


@cocotb.test()
async def three_passes_and_a_root(dut):
    """Cycles of a row without pauses: three times its beats, 34 + 17 for division and root, and the pipelines."""
    draw = np.random.default_rng(SEED)
    row, weights = draw.standard_normal(BEATS_MAX * LANES).astype(np.float16), norm_weights(draw, BEATS_MAX * LANES)
    await reset(dut)
    await load(dut, weights)
    ports = Ports(dut, "always")
    counter = CycleCounter(dut)
    ports.send([(row, 1e-5)])
    await ports.take(BEATS_MAX)
    assert counter.count <= 3 * BEATS_MAX + 34 + 17 + 24


# Where the row's store holds them: a skipped test would count as one that ran.
if BEATS_MAX * LANES >= MAX_WIDTH:

    @cocotb.test()
    async def the_widest_rows_fill_the_sum(dut):
        """2^14 values: the sum of squares and eps in 49 bits, the largest squares in 48, one value among zeros."""
        draw = np.random.default_rng(SEED)
        signs = draw.choice([-1.0, 1.0], MAX_WIDTH)
        weights = norm_weights(draw, MAX_WIDTH)
        eps = math.ldexp((1 << 47) - 1, -48) / MAX_WIDTH
        lone = np.zeros(MAX_WIDTH, np.float16)
        lone[-1] = 65504
        at_the_floor = (2047 * 2.0**-18 * signs).astype(np.float16)
        given = [(at_the_floor, eps), ((65504 * signs).astype(np.float16), eps), (lone, 0.0)]
        squares = contract.half.align(at_the_floor, 17, None, -18)[0] ** 2
        assert (int(squares.sum()) + NormConstants.of(MAX_WIDTH, eps).eps).bit_length() == 49
        await reset(dut)
        await load(dut, weights)
        ports = Ports(dut, "always")
        ports.send(given)
        for index, (row, constant) in enumerate(given):
            check(await ports.take(BEATS_MAX), wanted(row, constant, weights, StatusRegister()), f"row {index}")
