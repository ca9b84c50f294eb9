# SPDX-License-Identifier: Apache-2.0
"""weight_buffer: what was loaded is read back in order, a beat of Q vectors a cycle."""

from __future__ import annotations

import os
import random

import cocotb
from cocotb.triggers import RisingEdge
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

Q, VECTORS, WORDS, BITS = (int(os.environ[f"RTL_{name}"]) for name in ("Q", "VECTORS", "WORDS", "VECTORBITS"))


def packed(vectors: list[int]) -> int:
    return sum(value << (place * BITS) for place, value in enumerate(vectors))


async def load(dut, vectors: list[int], pattern: str) -> None:
    await Source(dut, "load", pattern).send([{"vectors": len(vectors)}])
    pieces = [vectors[i : i + VECTORS] for i in range(0, len(vectors), VECTORS)]
    await Source(dut, "mem", pattern).send(
        packed(piece + [(1 << BITS) - 1] * (VECTORS - len(piece))) for piece in pieces
    )


async def read(dut, beats: int, pattern: str) -> list[int]:
    await Source(dut, "read", pattern).send([{"beats": beats}])
    return [beat["data"] for beat in await Sink(dut, "w", ("data",), pattern).take(beats, 40 * beats + 100)]


def start(dut) -> None:
    for prefix in ("load", "mem", "read"):
        getattr(dut, f"{prefix}_valid_i").value = 0
    dut.w_ready_i.value = 0


@cocotb.test()
@cocotb.parametrize(pattern=PATTERNS)
async def loads_are_read_back(dut, pattern):
    """One beat, odd numbers of memory beats, the whole buffer; what an earlier load left beyond a shorter one stays."""
    draw = random.Random(SEED)
    start(dut)
    await reset(dut)
    held = [0] * (WORDS * Q // 2)
    for beats in (WORDS // 2, 1, 3, WORDS // 2 - 1):
        held[: beats * Q] = [draw.randrange(1 << BITS) for _ in range(beats * Q)]
        await load(dut, held[: beats * Q], pattern)
        for length in (WORDS // 2, beats):
            got = await read(dut, length, pattern)
            assert got == [packed(held[i * Q : (i + 1) * Q]) for i in range(length)]


@cocotb.test()
async def a_beat_a_cycle(dut):
    """Without pauses a read takes its beats and the latency of the memory."""
    start(dut)
    await reset(dut)
    await load(dut, list(range(WORDS * Q // 2)), "always")
    for beats in (1, WORDS // 2):
        await RisingEdge(dut.clk_i)
        counter = CycleCounter(dut)
        await read(dut, beats, "always")
        assert counter.count <= beats + 5


@cocotb.test()
async def reset_in_the_middle_of_a_load(dut):
    """The next load starts at the first vector."""
    start(dut)
    await reset(dut)
    task = cocotb.start_soon(load(dut, [1] * (2 * Q), "always"))
    for _ in range(4):
        await RisingEdge(dut.clk_i)
    task.cancel()
    start(dut)
    await reset(dut, running=True)
    vectors = list(range(1, Q + 1))
    await load(dut, vectors, "half")
    assert await read(dut, 1, "half") == [packed(vectors)]
