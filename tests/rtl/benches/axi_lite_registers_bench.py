# SPDX-License-Identifier: Apache-2.0
"""axi_lite_registers: the map, bytes of words, runs, status and counters, through cocotbext-axi's master."""

from __future__ import annotations

import logging
import os
import random

import cocotb
from cocotb.triggers import ReadOnly, RisingEdge
from cocotbext.axi import AxiLiteBus, AxiLiteMaster
from streams import PATTERNS, SEED, pauses, reset

G, T, Q, P, LANES, ROWS, ADDR = (
    int(os.environ[f"RTL_{name}"]) for name in ("G", "T", "Q", "P", "LANES", "ROWSMAX", "ADDRBITS")
)
CONTROL, STATUS, ID, BUILD, ROWS_MAX = 0x000, 0x004, 0x008, 0x00C, 0x010
PROGRAM, TOKENS, FIRST, CAPACITY, BASES, WEIGHTS, ANGLES = 0x018, 0x020, 0x024, 0x028, 0x040, 0x080, 0x088
COUNTERS = 9
ADDRESSES = [PROGRAM, *range(BASES, BASES + 64, 8), WEIGHTS, ANGLES]
MASKS = dict.fromkeys((TOKENS, FIRST, CAPACITY, *ADDRESSES), 0xFFFFFFFF)
MASKS |= dict.fromkeys((offset + 4 for offset in ADDRESSES), (1 << ADDR - 32) - 1)
bench = cocotb.test(timeout_time=1, timeout_unit="ms")


async def start(dut, pattern: str = "always") -> AxiLiteMaster:
    for name in ("done_i", "status_i", "phase_i", "event_i"):
        getattr(dut, name).value = 0
    for name in ("awvalid", "wvalid", "bready", "arvalid", "rready"):
        getattr(dut, f"s_axil_{name}").value = 0
    await reset(dut)
    logging.getLogger(f"cocotb.{dut._name}").setLevel(logging.ERROR)
    master = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk_i, dut.rst_i)
    if pattern != "always":
        write, read = master.write_if, master.read_if
        channels = (write.aw_channel, write.w_channel, write.b_channel, read.ar_channel, read.r_channel)
        for place, channel in enumerate(channels):
            channel.set_pause_generator(not go for go in pauses(pattern, 10 * SEED + place))
    return master


async def finish(dut) -> None:
    dut.done_i.value = 1
    await RisingEdge(dut.clk_i)
    dut.done_i.value = 0


def output(dut, offset: int) -> int:
    """What the unit gives of a setting."""
    if BASES <= offset < BASES + 64:
        return int(dut.base_o.value) >> (offset - BASES) // 8 * ADDR & (1 << ADDR) - 1
    names = {PROGRAM: "program", TOKENS: "tokens", FIRST: "first", CAPACITY: "capacity", WEIGHTS: "weights"}
    return int(getattr(dut, f"{names.get(offset, 'angles')}_o").value)


@bench
async def what_cannot_be_written(dut):
    """The build's constants, and every word that is not listed."""
    master = await start(dut)
    constants = {ID: 0x54574131, BUILD: G | T << 4 | Q << 12 | P << 20 | LANES << 24, ROWS_MAX: ROWS}
    for offset in range(4, 4096, 4):
        if offset not in MASKS and (offset < 0x180 or offset % 0x100 == 0 or offset == 0xFFC):
            await master.write_dword(offset, 0xFFFFFFFF)
            assert await master.read_dword(offset) == constants.get(offset, 0), hex(offset)
    for offset in MASKS:
        assert await master.read_dword(offset) == 0
    assert not dut.busy_o.value


@bench
@cocotb.parametrize(pattern=PATTERNS)
async def settings_are_kept_byte_by_byte(dut, pattern):
    """Random pieces of bytes against a plain array, with pauses on every channel."""
    master = await start(dut, pattern)
    draw = random.Random(SEED)
    held = bytearray(0x90)
    mask = b"".join(MASKS.get(offset, 0).to_bytes(4, "little") for offset in range(0, 0x90, 4))
    for _ in range(60):
        offset = draw.randrange(0x18, 0x90)
        data = draw.randbytes(min(draw.choice((1, 2, 3, 4, 8, 13)), 0x90 - offset))
        await master.write(offset, data)
        held[offset : offset + len(data)] = bytes(a & b for a, b in zip(data, mask[offset:], strict=False))
    assert (await master.read(0x18, 0x90 - 0x18)).data == held[0x18:]
    for offset in (TOKENS, FIRST, CAPACITY):
        assert output(dut, offset) == int.from_bytes(held[offset : offset + 4], "little")
    for offset in ADDRESSES:
        assert output(dut, offset) == int.from_bytes(held[offset : offset + 8], "little")


@bench
async def a_run(dut):
    """Reset of the units, then start, one cycle each; nothing is taken while busy; done until the next start."""
    master = await start(dut)
    await master.write_qword(PROGRAM, 0x1234567890)
    trace = []

    async def watch() -> None:
        while True:
            await ReadOnly()
            trace.append((int(dut.unit_reset_o.value), int(dut.start_o.value), int(dut.busy_o.value)))
            await RisingEdge(dut.clk_i)

    watcher = cocotb.start_soon(watch())
    await master.write_dword(CONTROL, 2)
    assert (await master.read_dword(CONTROL), dut.busy_o.value) == (0, 0)
    await master.write_dword(CONTROL, 1)
    assert await master.read_dword(CONTROL) == 1
    await master.write_qword(PROGRAM, 0xFFFFFFFFFF)
    await master.write_dword(CONTROL, 1)
    assert await master.read_qword(PROGRAM) == 0x1234567890
    watcher.cancel()
    at = trace.index((1, 0, 1))
    assert trace[at - 1] == (0, 0, 0)
    assert trace[at + 1] == (0, 1, 1)
    assert set(trace[at + 2 :]) == {(0, 0, 1)}
    assert not dut.done_o.value
    await finish(dut)
    assert await master.read_dword(CONTROL) == 2
    assert dut.done_o.value
    await master.write_qword(PROGRAM, 5)
    assert await master.read_qword(PROGRAM) == 5
    await master.write_dword(CONTROL, 1)
    assert await master.read_dword(CONTROL) == 1
    assert not dut.done_o.value


@bench
async def status_stays_until_cleared(dut):
    """A cycle is enough to set a bit; ones clear; a unit's level sets it once."""
    master = await start(dut)
    for bit in range(10):
        dut.status_i.value = 1 << bit
        await RisingEdge(dut.clk_i)
        dut.status_i.value = 0
        assert await master.read_dword(STATUS) == (2 << bit) - 1
    await master.write_dword(STATUS, 0x155)
    assert await master.read_dword(STATUS) == 0x2AA
    await master.write(STATUS + 1, b"\xff")
    assert await master.read_dword(STATUS) == 0x0AA
    await master.write_dword(CONTROL, 1)
    await master.write_dword(STATUS, 0x3FF)
    dut.status_i.value = 0x204
    assert await master.read_dword(STATUS) == 0x204
    await master.write_dword(STATUS, 0x200)
    assert await master.read_dword(STATUS) == 0x004
    dut.status_i.value = 0
    await RisingEdge(dut.clk_i)
    dut.status_i.value = 0x200
    await RisingEdge(dut.clk_i)
    assert await master.read_dword(STATUS) == 0x204


@bench
async def what_happens_while_status_is_cleared_is_kept(dut):
    """A bit that comes with the write that clears it, in the cycle before the answer, and any later one."""
    master = await start(dut)
    together = 0
    for delay in range(8):
        writing = cocotb.start_soon(master.write_dword(STATUS, 1))
        for _ in range(delay):
            await RisingEdge(dut.clk_i)
        dut.status_i.value = 1
        answered = bool(dut.s_axil_bvalid.value)
        await RisingEdge(dut.clk_i)
        await ReadOnly()
        same = not answered and bool(dut.s_axil_bvalid.value)
        await RisingEdge(dut.clk_i)
        dut.status_i.value = 0
        await writing
        assert await master.read_dword(STATUS) == int(same or together)
        together += same
    assert together == 1


@bench
async def counters_count_while_busy(dut):
    """Random phases and events; a start clears them."""
    master = await start(dut)
    draw = random.Random(SEED)
    for cycles in (200, 170):
        dut.phase_i.value = dut.event_i.value = 15
        await master.write_dword(CONTROL, 1)
        dut.phase_i.value = dut.event_i.value = 0
        before = [await counter(master, place) for place in range(COUNTERS)]
        assert 0 < before[1] <= before[0] < 100
        counts = [0] * COUNTERS
        for _ in range(cycles):
            phases, events = draw.getrandbits(4), draw.getrandbits(4)
            dut.phase_i.value, dut.event_i.value = phases, events
            await RisingEdge(dut.clk_i)
            counts[1:] = [n + ((events << 4 | phases) >> place & 1) for place, n in enumerate(counts[1:])]
        dut.phase_i.value = dut.event_i.value = 0
        await finish(dut)
        dut.phase_i.value = dut.event_i.value = 15
        after = [await counter(master, place) for place in range(COUNTERS)]
        assert [b - a for a, b in zip(before[1:], after[1:], strict=True)] == counts[1:]
        assert after[0] >= before[0] + cycles
        assert await counter(master, 0) == after[0]


async def counter(master: AxiLiteMaster, place: int) -> int:
    return await master.read_qword(0x100 + 8 * place)


@bench
async def cycles_of_a_run(dut):
    """From the units' reset to done, both included."""
    master = await start(dut)
    writing = cocotb.start_soon(master.write_dword(CONTROL, 1))
    while not dut.unit_reset_o.value:
        await RisingEdge(dut.clk_i)
    # An edge shows what was there before it: the first of 50 cycles is over, and the last one is that of done.
    for _ in range(48):
        await RisingEdge(dut.clk_i)
    await finish(dut)
    await writing
    assert await counter(master, 0) == 50


@bench
@cocotb.parametrize(place=range(COUNTERS))
async def counters_have_64_bits(dut, place):
    """A carry into the high word."""
    master = await start(dut)
    dut.phase_i.value = dut.event_i.value = 15
    await master.write_dword(CONTROL, 1)
    dut.gen_counter[place].count_q.value = (0xABCD << 32) - 3
    for _ in range(10):
        await RisingEdge(dut.clk_i)
    await finish(dut)
    assert 0xABCD << 32 <= await counter(master, place) < (0xABCD << 32) + 20


@bench
async def reset_in_the_middle(dut):
    """Of a run, of a write whose data has not come, and of a read."""
    master = await start(dut)
    await master.write_dword(TOKENS, 7)
    await master.write_dword(CONTROL, 1)
    master.write_if.w_channel.pause = True
    master.read_if.r_channel.pause = True
    write = cocotb.start_soon(master.write_dword(FIRST, 9))
    read = cocotb.start_soon(master.read_dword(TOKENS))
    for _ in range(10):
        await RisingEdge(dut.clk_i)
    write.cancel()
    read.cancel()
    await reset(dut, running=True)
    master.write_if.w_channel.pause = False
    master.read_if.r_channel.pause = False
    assert await master.read_qword(TOKENS) == 0
    assert await master.read_dword(CONTROL) == 0
    await master.write_dword(CAPACITY, 3)
    assert [await master.read_dword(offset) for offset in (FIRST, CAPACITY)] == [0, 3]
