# SPDX-License-Identifier: Apache-2.0
"""weight_reader: 768-bit beats come in order over three ports that pause each on its own."""

from __future__ import annotations

import itertools
import os
import random

import cocotb
from cocotb.triggers import RisingEdge
from memory import Memory, ReadPort, check_bursts
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

PORT_BYTES = int(os.environ["RTL_DATABITS"]) // 8
PORTS = 3
PIECE = 16 * PORT_BYTES
QUAD = 4 * PORT_BYTES
OUT_BYTES = 96
Command = tuple[int, int]  # address, 768-bit beats
bench = cocotb.test(timeout_time=1, timeout_unit="ms")


async def start(dut) -> None:
    for name in ("cmd_valid_i", "out_ready_i"):
        getattr(dut, name).value = 0
    for port in range(PORTS):
        for name in ("arready", "rvalid", "rid"):
            getattr(dut, f"m_axi_w{port}_{name}").value = 0
    await reset(dut)


def ports(dut, memory: Memory, pattern: str = "always", latency: int = 0) -> list[ReadPort]:
    return [ReadPort(dut, f"m_axi_w{port}", memory, pattern, latency, SEED + port) for port in range(PORTS)]


def expected(commands: list[Command], memory: Memory) -> list[dict[str, int]]:
    bytes_of = (
        b"".join(
            memory.expected(start, PORT_BYTES) for start in range(address, address + beats * OUT_BYTES, PORT_BYTES)
        )
        for address, beats in commands
    )
    return [
        {"data": int.from_bytes(one[place : place + OUT_BYTES], "little")}
        for one in bytes_of
        for place in range(0, len(one), OUT_BYTES)
    ]


async def run(dut, commands: list[Command], memory: Memory, pattern: str = "always") -> int:
    source, sink = Source(dut, "cmd", pattern, SEED + 5), Sink(dut, "out", ("data",), pattern)
    await RisingEdge(dut.clk_i)
    counter = CycleCounter(dut)
    cocotb.start_soon(source.send({"addr": address, "beats": beats} for address, beats in commands))
    wanted = expected(commands, memory)
    assert await sink.take(len(wanted), 120 * (len(wanted) + len(commands)) + 300) == wanted
    return counter.count


def pieces(commands: list[Command]) -> list[list[tuple[int, int]]]:
    """(address, port beats) that each port is to ask for: whole quads, cut at multiples of 16 port beats, in turn."""
    wanted: list[list[tuple[int, int]]] = [[] for _ in range(PORTS)]
    for address, beats in commands:
        if not beats:
            continue
        begin, end = address // QUAD * QUAD, -(-(address + beats * OUT_BYTES) // QUAD) * QUAD
        cuts = [begin, *range(begin // PIECE * PIECE + PIECE, end, PIECE), end]
        for turn, (low, high) in enumerate(itertools.pairwise(cuts)):
            wanted[turn % PORTS].append((low, (high - low) // PORT_BYTES))
    return wanted


def some_commands(draw: random.Random) -> list[Command]:
    """Every place within a quad and many within a piece, beats 0 and 1, matrices end to end, 4 KiB edges."""
    apart = [
        (0x10000 * i + OUT_BYTES * draw.randrange(600), beats) for i, beats in enumerate((1, 0, 2, 1, 5, 3, 16, 1, 50))
    ]
    base = 4096 * draw.randrange(1, 1 << 20)
    touching = [
        (base + OUT_BYTES * place, beats) for place, beats in ((0, 1), (1, 1), (2, 1), (3, 7), (10, 33), (43, 9))
    ]
    edge = [(base + 4096 - PORT_BYTES * back, 4) for back in range(1, 9)]
    return [*apart, *touching, *edge]


@bench
@cocotb.parametrize(pattern=PATTERNS)
async def commands_follow_each_other(dut, pattern):
    """Each port asks for its own pieces, once."""
    await start(dut)
    memory = Memory()
    masters = ports(dut, memory, pattern)
    commands = some_commands(random.Random(SEED))
    await run(dut, commands, memory, pattern)
    assert [port.bursts for port in masters] == pieces(commands)
    for port in masters:
        check_bursts(port.bursts, PORT_BYTES)
    assert not dut.bus_error_o.value


@bench
async def all_ports_all_the_time(dut):
    """In spite of 40 cycles of latency a beat takes what three ports need for it, matrices end to end little more."""
    await start(dut)
    memory = Memory()
    ports(dut, memory, latency=40)
    beat_cycles = OUT_BYTES // PORT_BYTES / PORTS
    assert await run(dut, [(OUT_BYTES * 5, 300)], memory) <= 300 * beat_cycles + 40 + 30
    three = [(0x9000 + OUT_BYTES * 100 * i, 100) for i in range(3)]
    assert await run(dut, three, memory) <= 300 * beat_cycles + 40 + 30 + 2 * 20


@bench
@cocotb.parametrize(port=[0, 1, 2])
async def an_error_of_any_port_is_remembered(dut, port):
    """The beats come all the same."""
    await start(dut)
    bad = 0x8000 + port * PIECE
    memory = Memory(range(bad + PORT_BYTES, bad + 2 * PORT_BYTES))
    ports(dut, memory)
    await run(dut, [(0x4000, 30)], memory)
    assert not dut.bus_error_o.value
    await run(dut, [(0x8000, 30), (0x4000, 30)], memory)
    assert dut.bus_error_o.value


@bench
async def reset_in_the_middle(dut):
    """Memory is reset too; nothing of the old command is left."""
    await start(dut)
    memory = Memory(range(64))
    ports(dut, memory, "half", latency=5)
    await Source(dut, "cmd").send([{"addr": 0, "beats": 100}])
    task = cocotb.start_soon(Sink(dut, "out", ("data",), "half").take(100, 4000))
    for _ in range(110):
        await RisingEdge(dut.clk_i)
    assert dut.bus_error_o.value
    task.cancel()
    dut.out_ready_i.value = 0
    await reset(dut, running=True)
    await run(dut, [(0x1000 + OUT_BYTES, 20), *some_commands(random.Random(SEED + 1))], memory, "half")
    assert not dut.bus_error_o.value
