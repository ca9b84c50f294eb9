# SPDX-License-Identifier: Apache-2.0
"""axi_reader: commands' beats come in order from memory that pauses, answers late, or answers with errors."""

from __future__ import annotations

import os
import random

import cocotb
from cocotb.triggers import RisingEdge
from memory import Memory, ReadPort, check_bursts
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

BYTES = int(os.environ["RTL_DATABITS"]) // 8
DEPTH = 64
Command = tuple[int, int]  # address, beats
bench = cocotb.test(timeout_time=1, timeout_unit="ms")


async def start(dut) -> None:
    for name in ("cmd_valid_i", "out_ready_i", "m_axi_arready", "m_axi_rvalid", "m_axi_rid"):
        getattr(dut, name).value = 0
    await reset(dut)


def expected(commands: list[Command], memory: Memory) -> list[dict[str, int]]:
    return [
        {
            "data": int.from_bytes(memory.expected(address + beat * BYTES, BYTES), "little"),
            "last": int(beat == beats - 1),
        }
        for address, beats in commands
        for beat in range(beats)
    ]


async def run(dut, commands: list[Command], memory: Memory, pattern: str = "always") -> int:
    source, sink = Source(dut, "cmd", pattern, SEED + 5), Sink(dut, "out", ("data", "last"), pattern)
    await RisingEdge(dut.clk_i)
    counter = CycleCounter(dut)
    cocotb.start_soon(source.send({"addr": address, "beats": beats} for address, beats in commands))
    wanted = expected(commands, memory)
    assert await sink.take(len(wanted), 40 * (len(wanted) + len(commands)) + 300) == wanted
    return counter.count


def some_commands(draw: random.Random) -> list[Command]:
    """4 KiB edges in the middle, one beat and none, far addresses."""
    edge = [
        (4096 * draw.randrange(1, 1 << 20) - before * BYTES, beats) for before, beats in ((1, 2), (3, 40), (16, 16))
    ]
    short = [(draw.randrange(1 << 30) * BYTES, beats) for beats in (1, 0, 1, 1, 0, 2, 17, 33)]
    return [(0, 0), *edge, *short, ((1 << 40) - 20 * BYTES, 20)]


@bench
@cocotb.parametrize(pattern=PATTERNS)
async def commands_follow_each_other(dut, pattern):
    """Pauses on commands, AR, R and the stream."""
    await start(dut)
    memory = Memory()
    port = ReadPort(dut, "m_axi", memory, pattern)
    commands = some_commands(random.Random(SEED))
    await run(dut, commands, memory, pattern)
    check_bursts(port.bursts, BYTES)
    assert sum(beats for _, beats in port.bursts) == sum(beats for _, beats in commands)
    assert not dut.bus_error_o.value


@bench
async def a_beat_a_cycle_in_spite_of_latency(dut):
    """One long command and many of one burst: bursts under way hide 40 cycles of latency."""
    await start(dut)
    memory = Memory()
    ReadPort(dut, "m_axi", memory, latency=40)
    assert await run(dut, [(0x12340, 600)], memory) <= 600 + 40 + 12
    assert await run(dut, [(1024 * i, 4) for i in range(100)], memory) <= 400 + 40 + 12


@bench
async def no_more_is_asked_for_than_there_is_room(dut):
    """With nobody taking, memory is never made to wait: bursts are asked for whole, as long as they fit."""
    await start(dut)
    memory = Memory()
    port = ReadPort(dut, "m_axi", memory)
    address = 3 * BYTES
    await Source(dut, "cmd").send([{"addr": address, "beats": 200}])
    for _ in range(300):
        await RisingEdge(dut.clk_i)
        assert dut.m_axi_rready.value or not dut.m_axi_rvalid.value
    assert sum(beats for _, beats in port.bursts) == DEPTH - 3
    wanted = expected([(address, 200)], memory)
    assert await Sink(dut, "out", ("data", "last")).take(200, 400) == wanted


@bench
async def errors_are_remembered_and_nothing_hangs(dut):
    """Beats of an error response come too."""
    await start(dut)
    memory = Memory(range(0x2000 + 3 * BYTES, 0x2000 + 5 * BYTES))
    ReadPort(dut, "m_axi", memory)
    await run(dut, [(0x1000, 20)], memory)
    assert not dut.bus_error_o.value
    await run(dut, [(0x2000, 20), (0x3000, 5)], memory)
    assert dut.bus_error_o.value
    await run(dut, [(0x1000, 20)], memory)
    assert dut.bus_error_o.value


@bench
async def a_burst_of_another_length_is_an_error(dut):
    """RLAST too early; the command still ends where it should."""
    await start(dut)
    dut.m_axi_arready.value = 1
    cocotb.start_soon(Source(dut, "cmd").send([{"addr": 0, "beats": 2}]))
    sink = cocotb.start_soon(Sink(dut, "out", ("data", "last")).take(2, 50))
    for _ in range(6):
        await RisingEdge(dut.clk_i)
    dut.m_axi_rresp.value = 0
    dut.m_axi_rvalid.value = 1
    for data in (5, 6):
        dut.m_axi_rdata.value = data
        dut.m_axi_rlast.value = 1
        await RisingEdge(dut.clk_i)
    dut.m_axi_rvalid.value = 0
    assert await sink == [{"data": 5, "last": 0}, {"data": 6, "last": 1}]
    assert dut.bus_error_o.value


@bench
async def reset_in_the_middle_of_a_burst(dut):
    """Memory is reset too; nothing of the old command is left, and the error is forgotten."""
    await start(dut)
    memory = Memory(range(64))
    ReadPort(dut, "m_axi", memory, "half", latency=5)
    await Source(dut, "cmd").send([{"addr": 0, "beats": 300}])
    task = cocotb.start_soon(Sink(dut, "out", ("data", "last"), "half").take(300, 1000))
    for _ in range(60):
        await RisingEdge(dut.clk_i)
    assert dut.bus_error_o.value
    task.cancel()
    dut.out_ready_i.value = 0
    await reset(dut, running=True)
    await run(dut, some_commands(random.Random(SEED + 1)), memory, "half")
    assert not dut.bus_error_o.value
