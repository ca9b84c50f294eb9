# SPDX-License-Identifier: Apache-2.0
"""dequant_fuse against the contract's Python."""

from __future__ import annotations

import os
from dataclasses import dataclass

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from numpy.typing import NDArray
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

from tilewright.edge import contract
from tilewright.edge.contract import Factor, StatusRegister
from tilewright.edge.contract.rows import FUSE_MODES, rope_table

LANES = int(os.environ["RTL_LANES"])
HEAD_BEATS = 2
LATENCY = 13


def vector(values: NDArray) -> int:
    return int.from_bytes(np.ascontiguousarray(values).tobytes(), "little")


@dataclass
class Row:
    """One command: what comes in, and by which factor."""

    acc: NDArray[np.int32]
    mode: str
    scale: int
    factor: Factor
    side: NDArray | None = None
    head_beats: int = 1

    @property
    def beats(self) -> int:
        return len(self.acc) // LANES

    def wanted(self, status: StatusRegister) -> NDArray[np.float16]:
        side = None if self.side is None else self.side[None]
        if self.mode == "rope":
            side = self.side.reshape(1, -1, 2)
        scale = np.array([self.scale])
        return contract.dequant_fuse(self.acc[None], scale, self.factor, self.mode, side, status)[0]


def halves(draw: np.random.Generator, count: int) -> NDArray[np.float16]:
    """Over all of float16's exponents, with zeros."""
    wide = draw.standard_normal(count) * 2.0 ** draw.integers(-26, 16, count)
    wide[draw.random(count) < 0.1] = 0
    return wide.clip(-65504, 65504).astype(np.float16)


def rows(draw: np.random.Generator) -> list[Row]:
    """All modes, over magnitudes from underflow to saturation, of several lengths, one beat among them."""
    found = []
    for mode in FUSE_MODES:
        for beats, bits, exponent in ((4, 20, -24), (2, 26, -30), (6, 12, -4), (2, 24, -58), (1, 15, -17)):
            if mode == "rope":
                beats = -(-beats // HEAD_BEATS) * HEAD_BEATS
            acc = draw.integers(-(1 << bits) + 1, 1 << bits, beats * LANES).astype(np.int32)
            acc[draw.random(len(acc)) < 0.1] = 0
            scale = int(draw.integers(0x00A8, 0x7C00))
            factor = Factor(int(draw.integers(1 << 16, 1 << 17)), exponent - (scale >> 10))
            side = halves(draw, len(acc))
            if mode == "rope":
                side = rope_table(50, HEAD_BEATS * LANES)[draw.integers(0, 50)].reshape(-1)
            found.append(Row(acc, mode, scale, factor, None if mode == "bypass" else side, HEAD_BEATS))
    # Same sign, largest values; ties of the factor; what cancels.
    top = np.full(2 * LANES, (1 << 26) - 1, np.int32)
    found.append(Row(top, "bypass", 0x7BFF, Factor((1 << 17) - 1, -40)))
    found.append(Row(-top, "squared_relu", 0x00A8, Factor(1 << 16, -30), np.full(2 * LANES, -65504, np.float16)))
    found.append(Row(top, "silu", 0x3C00, Factor(1 << 16, -30), np.full(2 * LANES, 65504, np.float16)))
    ones = np.full(LANES, 1, np.int32)
    found.append(Row(ones, "residual", 0x3C00, Factor(1 << 16, -16), np.full(LANES, -1, np.float16)))
    for scale in range(0x3C00, 0x3C40):
        found.append(Row(ones * 3, "bypass", scale, Factor((1 << 16) + 7 * scale % 65536, -16)))
    return found


class Ports:
    """Sources and the sink of a test."""

    def __init__(self, dut, pattern: str) -> None:
        self.cmd, self.acc = Source(dut, "cmd", pattern), Source(dut, "acc", pattern, SEED + 5)
        self.side, self.sink = Source(dut, "side", pattern, SEED + 9), Sink(dut, "out", ("data", "last"), pattern)

    def send(self, given: list[Row], lengths: list[int] | None = None) -> None:
        """Start sending; ``lengths`` are beats that really come, where they are not what the command says."""
        lengths = lengths or [row.beats for row in given]
        commands = [
            {
                "mode": FUSE_MODES.index(row.mode), "scale": row.scale, "mantissa": row.factor.mantissa,
                "exponent": row.factor.exponent, "beats": row.beats, "head_beats": row.head_beats,
            }
            for row in given
        ]  # fmt: skip
        acc = [
            {"data": vector(np.resize(row.acc, length * LANES)[i * LANES :][:LANES]), "last": int(i == length - 1)}
            for row, length in zip(given, lengths, strict=True)
            for i in range(length)
        ]
        sides = [
            vector(piece)
            for row, length in zip(given, lengths, strict=True)
            if row.side is not None
            for piece in row.side.reshape(-1, LANES)[: min(length, row.beats)]
        ]
        senders = (self.cmd.send(commands), self.acc.send(acc), self.side.send(sides))
        self.tasks = [cocotb.start_soon(sender) for sender in senders]

    async def take(self, beats: int) -> NDArray[np.uint16]:
        """One row; checks that its last beat is marked."""
        got = await self.sink.take(beats, 60 * (beats + 40))
        assert [beat["last"] for beat in got] == [0] * (beats - 1) + [1]
        return np.frombuffer(b"".join(beat["data"].to_bytes(2 * LANES, "little") for beat in got), np.uint16)


@cocotb.test()
@cocotb.parametrize(pattern=PATTERNS)
async def rows_equal_the_contract(dut, pattern):
    """Every kind of row, back to back; and the status of all."""
    await reset(dut)
    given = rows(np.random.default_rng(SEED))
    ports, status = Ports(dut, pattern), StatusRegister()
    ports.send(given)
    for index, row in enumerate(given):
        got, wanted = await ports.take(row.beats), row.wanted(status).view(np.uint16)
        np.testing.assert_array_equal(got, wanted, err_msg=f"row {index}: {row.mode}")
    assert bool(dut.saturated_o.value) == (contract.Status.SATURATED in status.value)
    assert contract.Status.SATURATED in status.value
    for name in ("nonfinite", "acc_clamp", "short_frame", "long_frame"):
        assert not getattr(dut, f"{name}_o").value, name


@cocotb.test()
async def sums_beyond_the_limit_are_clamped(dut):
    """And seen in the status."""
    await reset(dut)
    acc = np.resize(np.array([1 << 26, -(1 << 26), (1 << 31) - 1, -(1 << 31)], np.int64), 2 * LANES).astype(np.int32)
    row = Row(acc, "bypass", 0x3C00, Factor(1 << 16, -34))
    ports = Ports(dut, "half")
    ports.send([row])
    np.testing.assert_array_equal(await ports.take(2), row.wanted(StatusRegister()).view(np.uint16))
    assert dut.acc_clamp_o.value


@cocotb.test()
async def sides_that_are_not_finite_are_taken_as_the_contract_says(dut):
    """In every mode that has a float16 beside it."""
    wild = np.resize(np.array([np.nan, np.inf, -np.inf, 1.0], np.float16), 2 * LANES)
    for mode in ("residual", "silu", "squared_relu"):
        await reset(dut, running=mode != "residual")
        row = Row(np.arange(1, 2 * LANES + 1, dtype=np.int32), mode, 0x3C00, Factor(1 << 16, -16), wild)
        ports = Ports(dut, "half")
        assert not dut.nonfinite_o.value
        ports.send([row])
        np.testing.assert_array_equal(await ports.take(2), row.wanted(StatusRegister()).view(np.uint16))
        assert dut.nonfinite_o.value


@cocotb.test()
async def frames_of_a_wrong_length_are_seen_and_passed(dut):
    """A short row ends where it ends, of a long one the rest is dropped; the next row is right."""
    good = Row(np.arange(3 * LANES, dtype=np.int32), "bypass", 0x3C00, Factor(1 << 16, -16))
    for length, flag in ((2, "short_frame"), (5, "long_frame")):
        await reset(dut, running=length == 5)
        ports = Ports(dut, "half")
        ports.send([good, good], [length, 3])
        await ports.take(min(length, 3))
        np.testing.assert_array_equal(await ports.take(3), good.wanted(StatusRegister()).view(np.uint16))
        assert getattr(dut, f"{flag}_o").value
        assert int(dut.short_frame_o.value) + int(dut.long_frame_o.value) == 1


@cocotb.test()
async def a_reset_in_a_row_leaves_nothing_behind(dut):
    """Neither beats nor angles nor a row that is half done."""
    await reset(dut)
    given = rows(np.random.default_rng(SEED + 1))[10:15]
    ports = Ports(dut, "always")
    ports.send(given)
    for _ in range(9):
        await RisingEdge(dut.clk_i)
    for task in ports.tasks:
        task.cancel()
    for name in ("cmd", "acc", "side"):
        getattr(dut, f"{name}_valid_i").value = 0
    await reset(dut, running=True)
    assert not dut.out_valid_o.value
    ports = Ports(dut, "always")
    ports.send(given[2:])
    for row in given[2:]:
        np.testing.assert_array_equal(await ports.take(row.beats), row.wanted(StatusRegister()).view(np.uint16))


@cocotb.test()
async def a_beat_a_cycle(dut):
    """Without pauses a row takes its beats, its factor and the pipeline."""
    await reset(dut)
    row = Row(np.arange(64 * LANES, dtype=np.int32), "bypass", 0x3C00, Factor(1 << 16, -16))
    ports = Ports(dut, "always")
    await RisingEdge(dut.clk_i)
    counter = CycleCounter(dut)
    ports.send([row, row])
    await ports.take(64)
    await ports.take(64)
    assert counter.count <= 2 * (64 + 3) + LATENCY + 4
