# SPDX-License-Identifier: Apache-2.0
"""gearbox: frames of every length keep their lanes and their order."""

from __future__ import annotations

import os
import random

import cocotb
from cocotb.triggers import RisingEdge
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

IN, OUT, WIDTH = (int(os.environ[f"RTL_{name}"]) for name in ("IN", "OUT", "WIDTH"))


def packed(lanes: list[int]) -> int:
    return sum(value << (place * WIDTH) for place, value in enumerate(lanes))


def beats_of(frame: list[int]) -> list[dict[str, int]]:
    pieces = [frame[i : i + IN] for i in range(0, len(frame), IN)]
    return [
        {
            "data": packed(piece + [(1 << WIDTH) - 1] * (IN - len(piece))),
            "lanes": len(piece),
            "last": int(i == len(pieces) - 1),
        }
        for i, piece in enumerate(pieces)
    ]


def expected(frame: list[int]) -> list[dict[str, int]]:
    pieces = [frame[i : i + OUT] for i in range(0, len(frame), OUT)]
    return [{"data": packed(piece), "last": int(i == len(pieces) - 1)} for i, piece in enumerate(pieces)]


async def run(dut, frames: list[list[int]], pattern: str) -> int:
    source, sink = Source(dut, "in", pattern), Sink(dut, "out", ("data", "last"), pattern)
    await RisingEdge(dut.clk_i)
    counter = CycleCounter(dut)
    cocotb.start_soon(source.send(beat for frame in frames for beat in beats_of(frame)))
    wanted = [beat for frame in frames for beat in expected(frame)]
    beats = sum(len(beats_of(frame)) for frame in frames)
    assert await sink.take(len(wanted), 50 * (len(wanted) + beats) + 100) == wanted
    return counter.count


@cocotb.test()
@cocotb.parametrize(pattern=PATTERNS)
async def frames_back_to_back(dut, pattern):
    """Lengths 1, the ratio's neighbours, primes."""
    draw = random.Random(SEED)
    await reset(dut)
    lengths = [1, IN, IN + 1, OUT - 1 or 1, OUT, OUT + 1, IN * OUT, 97, 211]
    await run(dut, [[draw.randrange(1 << WIDTH) for _ in range(n)] for n in lengths], pattern)


@cocotb.test()
async def a_long_frame_takes_a_cycle_a_beat_of_the_longer_side(dut):
    """Full throughput."""
    await reset(dut)
    count = 7 * IN * OUT
    taken = await run(dut, [[i % (1 << WIDTH) for i in range(count)]], "always")
    assert taken <= count // min(IN, OUT) + 6


@cocotb.test()
async def reset_in_the_middle_of_a_frame(dut):
    """Nothing of the old frame is left."""
    await reset(dut)
    task = cocotb.start_soon(Source(dut, "in").send(beats_of([3] * (4 * IN))))
    for _ in range(3):
        await RisingEdge(dut.clk_i)
    task.cancel()
    dut.in_valid_i.value = 0
    await reset(dut, running=True)
    await run(dut, [[1] * (OUT + 1)], "half")
