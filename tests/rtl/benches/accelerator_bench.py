# SPDX-License-Identifier: Apache-2.0
"""accelerator: whole decoder layers by descriptors from memory, bit for bit the contract's."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from cocotbext.axi import AxiLiteBus, AxiLiteMaster
from memory import Memory, ReadPort, WritePort
from numpy.typing import NDArray
from streams import PATTERNS, SEED, pauses, reset

from tilewright.edge.contract import (
    Factor,
    KvCache,
    Layer,
    Linear,
    Status,
    StatusRegister,
    Tiling,
    beats_of,
    decoder_layer,
    pack_tlmm,
    rope_table,
)
from tilewright.edge.program import MATRICES, Buffer, Descriptor, Op, encode, layer_program
from tilewright.edge.tellme.cycles import Pipelines, layer_counters

G, T, Q, P, LANES, ROWS, BANKS = (
    int(os.environ[f"RTL_{name}"]) for name in ("G", "T", "Q", "P", "LANES", "ROWSMAX", "BANKS")
)
TILING = Tiling(G, T, Q, P, LANES)
LATENCY = 3
"""Cycles in which memory answers when it does not pause, give or take one by the port."""
CAPACITY, LAYERS = 11, 2
BASE = 0x7_0000_0000
PLACES = {
    name: BASE + 0x10000 * i for i, name in enumerate(("stream", "query", "mixed", "gate", "gated", "keys", "values"))
}
PROGRAM, ANGLES, WEIGHTS = BASE + 0x80000, BASE + 0x90000, BASE + 0xA0000
SIZE = 0x1_00000
CONTROL, STATUS = 0x000, 0x004
bench = cocotb.test(timeout_time=40, timeout_unit="ms")
Half = NDArray[np.float16]


def small_layer(draw: np.random.Generator, gate_map: str, norms: int) -> Layer:
    """Sizes that neither tiles nor lanes divide, but for the head's; four heads over two."""
    size = LANES * (2 if LANES < 16 else 1)
    d, f, heads, kv_heads = 3 * LANES + 3, 2 * T * G + 5, 4, 2

    def linear(inputs: int, outputs: int, norm: bool) -> Linear:
        weight = pack_tlmm(draw.integers(-1, 2, (outputs, inputs)).astype(np.int8), TILING)
        scale = Factor.of(0.7 / np.sqrt(inputs) / 127)
        return Linear(weight, scale, (1 + 0.1 * draw.standard_normal(inputs)).astype(np.float16) if norm else None)

    return Layer(
        q=linear(d, heads * size, True),
        k=linear(d, kv_heads * size, False),
        v=linear(d, kv_heads * size, False),
        o=linear(heads * size, d, norms == 4),
        gate=linear(d, f, True),
        up=linear(d, f, False),
        down=linear(f, d, norms == 4),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        eps=1e-5,
        gate_map=gate_map,
    )


class Bytes(Memory):
    """Memory that holds what is written; what was not is 0xFE, a NaN as float16. Only reads fail of ``bad_reads``."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray(b"\xfe") * SIZE
        self.bad_reads = range(0)

    async def read(self, address: int, length: int) -> bytes:
        self._check(address, length)
        if range(max(address, self.bad_reads.start), min(address + length, self.bad_reads.stop)):
            raise IndexError(f"address {address:#x} answers reads with an error")
        return bytes(self.data[address - BASE :][:length])

    async def write(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        self.put(address, data)

    def put(self, address: int, data: bytes) -> None:
        self.data[address - BASE : address - BASE + len(data)] = data

    def rows(self, address: int, rows: int, width: int) -> Half:
        """Rows of a buffer without their padding, which must be zeros."""
        stride = -(-width // LANES) * LANES
        found = np.frombuffer(bytes(self.data[address - BASE :][: rows * stride * 2]), np.float16).reshape(rows, stride)
        assert not found[:, width:].view(np.uint16).any()
        return found[:, :width]

    def put_rows(self, address: int, rows: Half) -> None:
        padding = np.zeros((len(rows), -rows.shape[1] % LANES), np.float16)
        self.put(address, np.hstack([rows, padding]).tobytes())


@dataclass
class Machine:
    """The accelerator, its memory and a layer's contract."""

    dut: object
    memory: Bytes
    master: AxiLiteMaster
    steady: bool  # memory without pauses

    @classmethod
    async def start(cls, dut, pattern: str = "always") -> Machine:
        for name in ("awvalid", "wvalid", "bready", "arvalid", "rready"):
            getattr(dut, f"s_axil_{name}").value = 0
        memory = Bytes()
        for place, name in enumerate(("w0", "w1", "w2", "k", "v", "x")):
            ReadPort(dut, f"m_axi_{name}", memory, pattern, latency=place % 3, seed=SEED + place)
        WritePort(dut, "m_axi_x", memory, pattern, SEED + 9)
        await reset(dut)
        logging.getLogger(f"cocotb.{dut._name}").setLevel(logging.ERROR)
        master = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk_i, dut.rst_i)
        if pattern != "always":
            write, read = master.write_if, master.read_if
            channels = (write.aw_channel, write.w_channel, write.b_channel, read.ar_channel, read.r_channel)
            for place, channel in enumerate(channels):
                channel.set_pause_generator(not go for go in pauses(pattern, SEED + 20 + place))
        return cls(dut, memory, master, pattern == "always")

    async def set64(self, offset: int, value: int) -> None:
        await self.master.write_qword(offset, value)

    async def settings(self, layer: Layer, index: int) -> list[Descriptor]:
        """Put the layer in memory and its places in the registers."""
        places, at = {}, 0
        for name in MATRICES:
            linear = getattr(layer, name)
            beats = beats_of(linear.weights, linear.norm)
            self.memory.put(WEIGHTS + at, beats.tobytes())
            places[name] = (at, len(beats))
            at += beats.size
        angles = rope_table(CAPACITY, layer.head_size).reshape(CAPACITY, -1)
        self.memory.put(ANGLES, angles.tobytes())
        await self.set64(0x018, PROGRAM)
        await self.set64(0x080, WEIGHTS)
        await self.set64(0x088, ANGLES)
        await self.master.write_dword(0x028, CAPACITY)
        for buffer in list(Buffer)[1:]:
            await self.set64(0x040 + 8 * buffer, PLACES[buffer.name.lower()])
        program = layer_program(layer, index, places)
        self.memory.put(PROGRAM, encode(program).tobytes())
        return program

    async def run(self, tokens: int, first: int, most_cycles: int = 400_000) -> Status:
        """Start, wait, and the status word."""
        await self.master.write_dword(0x020, tokens)
        await self.master.write_dword(0x024, first)
        await self.master.write_dword(CONTROL, 1)
        for _ in range(most_cycles):
            await RisingEdge(self.dut.clk_i)
            if self.dut.irq_o.value:
                break
        else:
            raise AssertionError(f"no end in {most_cycles} cycles")
        for _ in range(3):
            await RisingEdge(self.dut.clk_i)
        return Status(await self.master.read_dword(STATUS))

    async def counter(self, offset: int) -> int:
        return await self.master.read_qword(offset)


def cached(memory: Bytes, name: str, index: int, layer: Layer, seen: int) -> Half:
    """Keys or values of a layer's positions, oldest first."""
    width = layer.kv_heads * layer.head_size
    rows = memory.rows(PLACES[name] + index * CAPACITY * width * 2, CAPACITY, width)
    return rows[::-1][:seen].reshape(seen, layer.kv_heads, layer.head_size)


async def counted(machine: Machine, layer: Layer, first: int, tokens: int) -> None:
    """The counters of cycles against the schedule's, with what a burst's place and a root's search may differ."""
    wanted = layer_counters(layer, TILING, first, tokens, banks=BANKS, pipelines=Pipelines(LATENCY))
    for offset, (name, cycles) in zip(range(0x100, 0x128, 8), wanted.items(), strict=True):
        found = await machine.counter(offset)
        assert abs(found - cycles) < 0.02 * cycles + 32, f"{name}: {found}, the schedule takes {cycles}"


async def through(
    machine: Machine, layer: Layer, index: int, chunks: tuple[int, ...], draw: np.random.Generator
) -> None:
    """Chunks of tokens one after the other, each compared with the contract: rows, caches, status."""
    await machine.settings(layer, index)
    width = layer.o.weights.outputs
    cache = KvCache.empty(CAPACITY, layer.kv_heads, layer.head_size)
    angles = rope_table(CAPACITY, layer.head_size)
    for tokens in chunks:
        first, x, status = cache.seen, draw.standard_normal((tokens, width)).astype(np.float16), StatusRegister()
        wanted = decoder_layer(x, layer, cache, angles, status=status)
        machine.memory.put_rows(PLACES["stream"], x)
        got = await machine.run(tokens, first)
        assert got == status.value, f"status {got!r}, needed {status.value!r}"
        found = machine.memory.rows(PLACES["stream"], tokens, width)
        np.testing.assert_array_equal(found.view(np.uint16), wanted.view(np.uint16))
        for name, side in (("keys", cache.k), ("values", cache.v)):
            kept = cached(machine.memory, name, index, layer, cache.seen)
            np.testing.assert_array_equal(kept.view(np.uint16), side[: cache.seen].view(np.uint16), err_msg=name)
        assert await machine.counter(0x140) == 9
        assert await machine.counter(0x128) == sum(
            len(beats_of(getattr(layer, name).weights, getattr(layer, name).norm)) for name in MATRICES
        )
        if machine.steady:
            await counted(machine, layer, first, tokens)
        keys = sum(range(cache.seen, cache.seen - tokens, -P))
        assert await machine.counter(0x130) == await machine.counter(0x138) == keys


@bench
async def a_layer_equals_the_contract(dut):
    """A prompt in chunks, then tokens one by one, without pauses; both gates, with and without inner norms."""
    draw = np.random.default_rng(SEED)
    machine = await Machine.start(dut)
    await through(machine, small_layer(draw, "silu", 2), 1, (ROWS, 1, 1), draw)
    await through(machine, small_layer(draw, "squared_relu", 4), 0, (3, 2), draw)


@bench
@cocotb.parametrize(pattern=[pattern for pattern in PATTERNS if pattern not in ("always", "seldom")])
async def a_layer_equals_the_contract_under_pauses(dut, pattern):
    """On every channel of every port."""
    draw = np.random.default_rng(SEED)
    machine = await Machine.start(dut, pattern)
    await through(machine, small_layer(draw, "squared_relu", 4), 1, (3, 1), draw)


@bench
async def what_cannot_be_done_is_said(dut):
    """Bad descriptors and settings end the run with their bit; a right run follows."""
    draw = np.random.default_rng(SEED)
    machine = await Machine.start(dut)
    layer = small_layer(draw, "silu", 2)
    good = await machine.settings(layer, 0)

    async def refused(program: list[Descriptor], tokens: int = 1, first: int = 0) -> None:
        machine.memory.put(PROGRAM, encode(program).tobytes())
        machine.memory.put_rows(PLACES["stream"], np.ones((ROWS, layer.o.weights.outputs), np.float16))
        status = await machine.run(tokens, first)
        assert Status.BAD_DESCRIPTOR in status, program[0]
        await machine.master.write_dword(STATUS, 0xFFFFFFFF)
        assert await machine.master.read_dword(STATUS) == 0

    linear, attend = good[0], next(one for one in good if one.op == Op.ATTEND)
    changes = [
        {"op": 7}, {"op": 0}, {"inputs": 0}, {"outputs": 0}, {"inputs": 1 << 20}, {"outputs": 1 << 20}, {"mode": 5},
        {"target": 9}, {"target": 0}, {"source": 0}, {"beats": 0}, {"beats": linear.beats - 1},
        {"beats": linear.beats + 2}, {"geometry": 0}, {"flags": 0}, {"source": Buffer.KEYS}, {"layer": 1 << 16},
        {"mode": 1}, {"address": LANES}, {"target": Buffer.KEYS},
    ]  # fmt: skip
    for change in changes:
        await refused([Descriptor(**{**vars(linear), **change}), Descriptor(Op.END)])
    size = layer.head_size << 16
    for change in (
        {"geometry": attend.geometry + (1 << 16)}, {"geometry": 0xFF01}, {"geometry": 255},
        {"geometry": 3 | 2 << 8 | size}, {"geometry": 5 | 1 << 8 | size}, {"source": 0}, {"target": Buffer.VALUES},
    ):  # fmt: skip
        await refused([Descriptor(**{**vars(attend), **change}), Descriptor(Op.END)])
    for tokens, first in ((0, 0), (ROWS + 1, 0), (1, CAPACITY), (2, CAPACITY - 1)):
        await refused(good, tokens, first)
    await through(machine, layer, 0, (2,), draw)


# Where errors are, whether in reads only, and how many descriptors have been read when the run ends.
ERRORS = [
    (PROGRAM, False, 1), (WEIGHTS, False, 1), (PLACES["stream"], False, 1), (ANGLES, False, 1),
    (PLACES["query"], False, 1), (PLACES["keys"], False, 2), (PLACES["values"], False, 3), (PLACES["keys"], True, 4),
    (PLACES["values"], True, 4), (PLACES["query"], True, 4), (PLACES["gate"], True, 7),
]  # fmt: skip


@bench
async def a_bus_error_ends_the_run(dut):
    """Of each port, read or written: its bit, no descriptor behind the one it came in, and the next run is right."""
    draw = np.random.default_rng(SEED)
    layer, machine = small_layer(draw, "silu", 2), await Machine.start(dut)
    program = await machine.settings(layer, 0)
    for place, reads, descriptors in ERRORS:
        machine.memory.put_rows(PLACES["stream"], np.ones((1, layer.o.weights.outputs), np.float16))
        machine.memory.put(PLACES["query"], b"\xfe" * 0x100)
        where = range(place, place + 0x4000)
        machine.memory.bad, machine.memory.bad_reads = (range(0), where) if reads else (where, range(0))
        status = await machine.run(1, 0)
        assert status & (Status.BUS_ERROR | Status.BAD_DESCRIPTOR) == Status.BUS_ERROR, hex(place)
        assert await machine.counter(0x140) == descriptors, hex(place)
        if place == WEIGHTS:
            # A matrix that was not read is not multiplied.
            assert machine.memory.data[PLACES["query"] - BASE :][:0x100] == b"\xfe" * 0x100
        await machine.master.write_dword(STATUS, 0xFFFFFFFF)
    # A descriptor that did not come as a whole is not carried out, though what is left of it could be.
    machine.memory.put(PROGRAM, encode([program[MATRICES.index("gate") + 1], Descriptor(Op.END)]).tobytes())
    machine.memory.put(PLACES["gate"], b"\xfe" * 0x100)
    machine.memory.bad, machine.memory.bad_reads = range(0), range(PROGRAM + 56, PROGRAM + 64)
    assert await machine.run(1, 0) == Status.BUS_ERROR
    assert machine.memory.data[PLACES["gate"] - BASE :][:0x100] == b"\xfe" * 0x100
    machine.memory.bad_reads = range(0)
    await machine.master.write_dword(STATUS, 0xFFFFFFFF)
    await through(machine, layer, 0, (1,), draw)


@bench
async def a_reset_in_a_layer_leaves_nothing_behind(dut):
    """In several of its phases, memory's ports with it; then a right run."""
    draw = np.random.default_rng(SEED)
    layer, machine = small_layer(draw, "silu", 2), await Machine.start(dut)
    for cycles in (5, 60, 300, 700, 1300, 2000, 3100):
        await machine.settings(layer, 0)
        machine.memory.put_rows(PLACES["stream"], np.ones((2, layer.o.weights.outputs), np.float16))
        await machine.master.write_dword(0x020, 2)
        await machine.master.write_dword(0x024, 0)
        await machine.master.write_dword(CONTROL, 1)
        for _ in range(cycles):
            await RisingEdge(dut.clk_i)
        await reset(dut, running=True)
    await through(machine, layer, 1, (2,), draw)
