# SPDX-License-Identifier: Apache-2.0
"""axi_writer: frames arrive in memory whole, whatever pauses, and wrong frames and error responses hang nothing."""

from __future__ import annotations

import os
import random

import cocotb
from cocotb.triggers import RisingEdge
from memory import Memory, WritePort, check_bursts
from streams import PATTERNS, SEED, CycleCounter, Source, reset

BYTES = int(os.environ["RTL_DATABITS"]) // 8
Row = tuple[int, list[int], int]  # address, the frame's beats, the command's beats
bench = cocotb.test(timeout_time=1, timeout_unit="ms")


async def start(dut) -> None:
    for name in ("cmd_valid_i", "in_valid_i", "m_axi_awready", "m_axi_wready", "m_axi_bvalid", "m_axi_bid"):
        getattr(dut, name).value = 0
    await reset(dut)
    cocotb.start_soon(watch_bursts(dut))


def row(draw: random.Random, address: int, beats: int, frame: int | None = None) -> Row:
    return address, [draw.getrandbits(8 * BYTES) for _ in range(beats if frame is None else frame)], beats


def expected(rows: list[Row]) -> dict[int, int]:
    """Bytes by address: of each frame as many beats as the command names."""
    memory: dict[int, int] = {}
    for address, frame, beats in rows:
        for place, value in enumerate(frame[:beats]):
            memory.update(enumerate(value.to_bytes(BYTES, "little"), address + place * BYTES))
    return memory


def frames(rows: list[Row]) -> list[dict[str, int]]:
    return [
        {"data": value, "last": int(place == len(frame) - 1)}
        for _, frame, _ in rows
        for place, value in enumerate(frame)
    ]


async def idle(dut, most_cycles: int) -> None:
    for _ in range(most_cycles):
        await RisingEdge(dut.clk_i)
        if dut.idle_o.value:
            return
    raise AssertionError(f"writes are under way after {most_cycles} cycles")


async def watch_bursts(dut) -> None:
    """Data of a burst follow each other without a gap: all of it was there before it began."""
    inside = False
    while True:
        await RisingEdge(dut.clk_i)
        if dut.rst_i.value:
            inside = False
            continue
        assert dut.m_axi_wvalid.value or not inside, "W pauses within a burst"
        if dut.m_axi_wvalid.value and dut.m_axi_wready.value:
            inside = not dut.m_axi_wlast.value


async def run(dut, rows: list[Row], pattern: str = "always") -> int:
    commands, stream = Source(dut, "cmd", pattern, SEED + 5), Source(dut, "in", pattern, SEED + 6)
    await RisingEdge(dut.clk_i)
    counter = CycleCounter(dut)
    sent = cocotb.start_soon(stream.send(frames(rows)))
    await commands.send({"addr": address, "beats": beats} for address, _, beats in rows)
    await idle(dut, 40 * sum(max(beats, len(frame)) + 2 for _, frame, beats in rows) + 300)
    await sent
    return counter.count


def some_rows(draw: random.Random) -> list[Row]:
    """4 KiB edges in the middle, one beat and none, the end of memory; no place twice."""
    places = [
        (4096 * 7 - BYTES, 2),
        (4096 * 9 - 3 * BYTES, 40),
        (4096 * 16 - 16 * BYTES, 16),
        ((1 << 40) - 20 * BYTES, 20),
    ]
    places += [
        (4096 * (20 + i) + draw.randrange(32) * BYTES, beats) for i, beats in enumerate((1, 0, 1, 1, 0, 2, 17, 33))
    ]
    return [row(draw, address, beats) for address, beats in places]


@bench
@cocotb.parametrize(pattern=PATTERNS)
async def rows_arrive(dut, pattern):
    """Pauses on commands, the stream, AW, W and B."""
    await start(dut)
    memory = Memory()
    port = WritePort(dut, "m_axi", memory, pattern)
    rows = some_rows(random.Random(SEED))
    await run(dut, rows, pattern)
    assert memory.written == expected(rows)
    check_bursts(port.bursts, BYTES)
    assert not any(flag.value for flag in (dut.bus_error_o, dut.short_frame_o, dut.long_frame_o))


@bench
async def a_beat_a_cycle(dut):
    """A long row; short ones cost a cycle more each."""
    await start(dut)
    draw = random.Random(SEED)
    memory = Memory()
    WritePort(dut, "m_axi", memory)
    rows = [row(draw, 0x1240, 600)]
    assert await run(dut, rows) <= 600 + 30
    short = [row(draw, 0x100000 + 4096 * i, 4) for i in range(60)]
    assert await run(dut, short) <= 60 * 5 + 30
    assert memory.written == expected(rows + short)


@bench
@cocotb.parametrize(pattern=["always", "half"])
async def short_frames_leave_the_rest_alone(dut, pattern):
    """The rest is written with no byte enabled; the rows after it are right."""
    await start(dut)
    draw = random.Random(SEED)
    memory = Memory()
    port = WritePort(dut, "m_axi", memory, pattern)
    rows = [row(draw, 0x1000, 40, 3), row(draw, 0x3000, 17, 16), row(draw, 0x5000, 2, 1), row(draw, 0x7000, 20)]
    await run(dut, rows, pattern)
    assert memory.written == expected(rows)
    assert sum(beats for _, beats in port.bursts) == 79
    assert dut.short_frame_o.value
    assert not dut.long_frame_o.value


@bench
@cocotb.parametrize(pattern=["always", "half"])
async def long_frames_lose_what_is_too_much(dut, pattern):
    """Nothing is written past the row; the rows after it are right."""
    await start(dut)
    draw = random.Random(SEED)
    memory = Memory()
    WritePort(dut, "m_axi", memory, pattern)
    rows = [row(draw, 0x1000, 3, 40), row(draw, 0x3000, 16, 17), row(draw, 0x5000, 1, 2), row(draw, 0x7000, 20)]
    await run(dut, rows, pattern)
    assert memory.written == expected(rows)
    assert dut.long_frame_o.value
    assert not dut.short_frame_o.value


@bench
async def a_long_frame_is_not_idle(dut):
    """Until its last beat was taken."""
    await start(dut)
    memory = Memory()
    WritePort(dut, "m_axi", memory)
    await Source(dut, "cmd").send([{"addr": 0, "beats": 2}])
    stream = Source(dut, "in")
    await stream.send({"data": place, "last": 0} for place in range(50))
    assert memory.written == expected([(0, [0, 1], 2)])
    assert not dut.idle_o.value
    await stream.send([{"data": 0, "last": 1}])
    await idle(dut, 2)


@bench
async def errors_are_remembered_and_nothing_hangs(dut):
    """An error response of one burst; what comes after it is written."""
    await start(dut)
    draw = random.Random(SEED)
    memory = Memory(range(0x2000, 0x2000 + BYTES))
    WritePort(dut, "m_axi", memory)
    rows = [row(draw, 0x1000, 20)]
    await run(dut, rows)
    assert not dut.bus_error_o.value
    await run(dut, [row(draw, 0x2000, 1)])
    assert dut.bus_error_o.value
    rows.append(row(draw, 0x3000, 20))
    await run(dut, rows[1:])
    assert memory.written == expected(rows)
    assert dut.bus_error_o.value


@bench
async def idle_waits_for_the_last_answer(dut):
    """Without answers it does not become idle, and it stops after as many bursts as it may have under way."""
    await start(dut)
    draw = random.Random(SEED)
    memory = Memory()
    port = WritePort(dut, "m_axi", memory)
    port.b_channel.pause = True
    port.b_channel.queue_occupancy_limit = -1
    assert dut.idle_o.value
    rows = [row(draw, 4096 * i, 1) for i in range(20)]
    task = cocotb.start_soon(run(dut, rows))
    for _ in range(200):
        await RisingEdge(dut.clk_i)
    assert not dut.idle_o.value
    assert len(port.bursts) == 16
    port.b_channel.pause = False
    await task
    assert memory.written == expected(rows)


@bench
async def reset_in_the_middle_of_a_burst(dut):
    """Memory is reset too; nothing of the old row comes after it."""
    await start(dut)
    draw = random.Random(SEED)
    memory = Memory()
    port = WritePort(dut, "m_axi", memory)
    port.w_channel.pause = True
    await Source(dut, "cmd").send([{"addr": 0x1000, "beats": 300}])
    await Source(dut, "in", "half").send(frames([row(draw, 0x1000, 300, 20)]))
    for _ in range(40):
        await RisingEdge(dut.clk_i)
    assert dut.short_frame_o.value
    assert not dut.idle_o.value
    await reset(dut, running=True)
    assert not dut.short_frame_o.value
    port.w_channel.pause = False
    memory.written.clear()
    rows = some_rows(draw)
    await run(dut, rows, "half")
    assert memory.written == expected(rows)
