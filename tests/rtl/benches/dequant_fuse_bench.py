# SPDX-License-Identifier: Apache-2.0
"""dequant_fuse against the contract's Python."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

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
ALL_BEATS = (1 << 16) // 16
"""All of float16 in sixteen lanes; fewer lanes take a part of it."""


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
        # The side is what the command says, whatever comes of the sums.
        sides = [vector(piece) for row in given if row.side is not None for piece in row.side.reshape(-1, LANES)]
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
@cocotb.parametrize(mode=FUSE_MODES)
async def frames_of_a_wrong_length_are_seen_and_passed(dut, mode):
    """A short row ends where it ends, of a long one the rest is dropped; the next row is right, with its own side."""
    draw = np.random.default_rng(SEED)
    row = Row(
        draw.integers(-9999, 9999, 4 * LANES).astype(np.int32), mode, 0x3C00, Factor(1 << 16, -24), None, HEAD_BEATS
    )
    if mode == "rope":
        row.side = rope_table(50, HEAD_BEATS * LANES)[draw.integers(0, 50)].reshape(-1)
    elif mode != "bypass":
        row.side = halves(draw, 4 * LANES)
    after = replace(row, acc=row.acc[::-1].copy(), side=None if row.side is None else row.side[::-1].copy())
    for length in (1, 2, 3, 5, 9):
        await reset(dut, running=length > 1)
        ports = Ports(dut, "half")
        ports.send([row, after], [length, 4])
        whole = row.wanted(StatusRegister()).view(np.uint16)
        np.testing.assert_array_equal(await ports.take(min(length, 4)), whole[: length * LANES])
        np.testing.assert_array_equal(await ports.take(4), after.wanted(StatusRegister()).view(np.uint16))
        assert (bool(dut.short_frame_o.value), bool(dut.long_frame_o.value)) == (length < 4, length > 4)


@cocotb.test()
@cocotb.parametrize(mode=("residual", "silu", "squared_relu"))
async def every_float16_beside_the_sums(dut, mode):
    """All 65536 of them, in a drawn order, against sums of all magnitudes; the lanes share them out."""
    draw = np.random.default_rng(SEED + FUSE_MODES.index(mode))
    await reset(dut)
    every = draw.permutation(1 << 16).astype(np.uint16).view(np.float16)[: ALL_BEATS * LANES]
    bits = draw.integers(1, 26, len(every))
    acc = (draw.integers(-(1 << 25), 1 << 25, len(every)) >> (26 - bits)).astype(np.int32)
    row = Row(acc, mode, 0x3C00, Factor(0x1B504, -30), every)
    ports = Ports(dut, "always")
    ports.send([row])
    status = StatusRegister()
    np.testing.assert_array_equal(await ports.take(row.beats), row.wanted(status).view(np.uint16))
    assert dut.nonfinite_o.value
    assert bool(dut.saturated_o.value) == (contract.Status.SATURATED in status.value)


@cocotb.test()
async def rotations_of_any_angle(dut):
    """One head of one beat, many heads, the angles of one row not those of the next; int16's ends; what saturates."""
    draw = np.random.default_rng(SEED)
    await reset(dut)
    given = []
    for head_beats, heads, bits in ((1, 1, 20), (1, 5, 26), (2, 4, 12), (1, 3, 3), (2, 1, 26)):
        acc = draw.integers(-(1 << bits) + 1, 1 << bits, head_beats * heads * LANES).astype(np.int32)
        side = draw.integers(-(1 << 15), 1 << 15, head_beats * LANES).astype(np.int16)
        side[draw.random(len(side)) < 0.3] = draw.choice(np.array([-(1 << 15), (1 << 15) - 1, 1 << 14, 0], np.int16))
        given.append(Row(acc, "rope", 0x3C00, Factor(1 << 16, -26), side, head_beats))
    big = np.resize(np.array([(1 << 26) - 1, (1 << 26) - 1, -(1 << 26) + 1, 1], np.int32), 2 * LANES)
    given.append(Row(big, "rope", 0x7BFF, Factor((1 << 17) - 1, -42), rope_table(9, LANES)[8].reshape(-1), 1))
    # A large value times a cosine of two bits often lies halfway between two float16: its small neighbour, cut to the
    # last place of the pair, decides.
    tied = draw.integers(1 << 25, 1 << 26, 64 * LANES).astype(np.int32)
    tied[1::2] = draw.integers(-3, 4, 32 * LANES)
    side = np.resize(np.array([3 << 12, 1, 3 << 12, -1], np.int16), 2 * LANES)
    given.append(Row(tied, "rope", 0x3C00, Factor(0x1B504, -28), side, 2))
    ports, status = Ports(dut, "half"), StatusRegister()
    ports.send(given)
    for index, row in enumerate(given):
        got = await ports.take(row.beats)
        np.testing.assert_array_equal(got, row.wanted(status).view(np.uint16), err_msg=f"row {index}")
    assert contract.Status.SATURATED in status.value
    assert dut.saturated_o.value
    assert not dut.nonfinite_o.value


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
