# SPDX-License-Identifier: Apache-2.0
"""weight_unpack takes apart what the contract's stream puts together."""

from __future__ import annotations

import os
from dataclasses import dataclass

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

from tilewright.edge.contract.stream import beats_of, vectors_per_beat
from tilewright.edge.contract.weights import Tiling, TlmmWeights

G, T, Q = (int(os.environ[f"RTL_{name}"]) for name in ("G", "T", "Q"))
TILING = Tiling(g=G, t=T, q=Q)
PER_BEAT = vectors_per_beat(TILING)
GROUP = min(PER_BEAT, Q // 2)
NORM_PLACE = PER_BEAT * TILING.vector_bits
bench = cocotb.test(timeout_time=1, timeout_unit="ms")


@dataclass
class Matrix:
    """A command, its beats and what comes of them."""

    vectors: list[int]
    norms: list[int]
    beats: list[int]

    @property
    def command(self) -> dict[str, int]:
        return {"vectors": len(self.vectors), "norms": len(self.norms)}

    @property
    def groups(self) -> list[dict[str, int]]:
        groups = [self.vectors[i : i + GROUP] for i in range(0, len(self.vectors), GROUP)]
        return [{"data": sum(one << place * TILING.vector_bits for place, one in enumerate(group))} for group in groups]


def matrix(
    draw: np.random.Generator, blocks: int, outputs: int, norms: int, bad: tuple[int, int] | None = None
) -> Matrix:
    """Random indices, a bad one in the vector of that number if asked for; ones wherever nothing is to be read."""
    indices = draw.integers(0, 3**G, (blocks, TILING.padded_outputs(outputs), T), np.uint8)
    if bad is not None:
        vector, index = bad
        indices.reshape(-1, T)[vector, draw.integers(T)] = index
    weights = TlmmWeights(indices, outputs, blocks * TILING.block, TILING)
    norm = draw.integers(0, 0x7C00, norms, np.uint16)
    rows = beats_of(weights, norm.view(np.float16) if norms else None)
    shifts = np.arange(T) * TILING.index_bits
    vectors = [sum(int(i) << int(s) for i, s in zip(one, shifts, strict=True)) for one in indices.reshape(-1, T)]
    beats = []
    for place, row in enumerate(rows):
        read = max(0, min(len(vectors) - place * PER_BEAT, PER_BEAT)) * TILING.vector_bits
        mask = (1 << read) - 1 | (0xFFFF << NORM_PLACE if place < norms else 0)
        beats.append(int.from_bytes(row.tobytes(), "little") | (((1 << 768) - 1) & ~mask))
    return Matrix(vectors, norm.tolist(), beats)


async def start(dut) -> None:
    for name in ("cmd_valid_i", "in_valid_i", "vec_ready_i", "norm_ready_i"):
        getattr(dut, name).value = 0
    await reset(dut)


async def run(dut, matrices: list[Matrix], pattern: str = "always") -> int:
    commands, stream = Source(dut, "cmd", pattern, SEED + 5), Source(dut, "in", pattern, SEED + 6)
    vectors, norms = Sink(dut, "vec", ("data",), pattern, SEED + 7), Sink(dut, "norm", ("data",), pattern, SEED + 8)
    wanted_groups = [group for one in matrices for group in one.groups]
    wanted_norms = [{"data": norm} for one in matrices for norm in one.norms]
    beats = [beat for one in matrices for beat in one.beats]
    most = 40 * (len(wanted_groups) + len(beats)) + 200
    await RisingEdge(dut.clk_i)
    counter = CycleCounter(dut)
    cocotb.start_soon(commands.send(one.command for one in matrices))
    sent = cocotb.start_soon(stream.send(beats))
    taken = cocotb.start_soon(norms.take(len(wanted_norms), most)) if wanted_norms else None
    if wanted_groups:
        assert await vectors.take(len(wanted_groups), most) == wanted_groups
    if taken is not None:
        assert await taken == wanted_norms
    await sent
    cycles = counter.count
    for _ in range(2):  # until bad_index_o tells of the last beat
        await RisingEdge(dut.clk_i)
    return cycles


def some_matrices(draw: np.random.Generator) -> list[Matrix]:
    """One block and several, full beats only, no norm, fewer and more norm weights than beats; one beat of a matrix."""
    long = matrix(draw, PER_BEAT, 1, 2)
    return [
        matrix(draw, 1, 1, 0),
        matrix(draw, 2, 3 * Q - 1, 1),
        matrix(draw, 3, Q + 1, 60),
        matrix(draw, 5, 2 * Q, 3),
        matrix(draw, 1, 5 * Q, 0),
        long,
        Matrix(long.vectors[:PER_BEAT], long.norms[:1], long.beats[:1]),
    ]


@bench
@cocotb.parametrize(pattern=PATTERNS)
async def matrices_follow_each_other(dut, pattern):
    """Bits that nothing is to be read from are not, so they set no status either."""
    await start(dut)
    await run(dut, some_matrices(np.random.default_rng(SEED)), pattern)
    assert not dut.bad_index_o.value


@bench
async def a_group_a_cycle(dut):
    """As long as a beat holds vectors of several groups; else a beat a cycle."""
    await start(dut)
    one = matrix(np.random.default_rng(SEED), 20, 4 * Q, 5)
    assert await run(dut, [one]) <= max(len(one.groups), len(one.beats)) + 6


@bench
async def empty_commands(dut):
    """Nothing at all takes no beat; norm weights alone give no vector."""
    await start(dut)
    empty = Matrix([], [], [])
    norms = Matrix([], [1, 0x7BFF], [(value << NORM_PLACE) | (1 << NORM_PLACE) - 1 for value in (1, 0x7BFF)])
    await run(dut, [empty, norms, empty, matrix(np.random.default_rng(SEED), 1, Q, 2)], "half")
    assert not dut.bad_index_o.value


@bench
@cocotb.parametrize(where=["first", "middle", "last"])
async def bad_indices_are_remembered(dut, where):
    """The least and the largest, in the first vector, one between and the last one; the vectors come as they are."""
    await start(dut)
    draw = np.random.default_rng(SEED)
    count = 3 * 2 * Q
    bad = {"first": (0, 3**G), "middle": (count // 2, 3**G), "last": (count - 1, (1 << TILING.index_bits) - 1)}[where]
    await run(dut, [matrix(draw, 3, 2 * Q, 1)], "half")
    assert not dut.bad_index_o.value
    await run(dut, [matrix(draw, 3, 2 * Q, 1, bad)], "half")
    assert dut.bad_index_o.value
    await run(dut, [matrix(draw, 3, 2 * Q, 1)], "half")
    assert dut.bad_index_o.value


@bench
async def reset_in_the_middle(dut):
    """Nothing of the old matrix is left, and the bad index is forgotten."""
    await start(dut)
    draw = np.random.default_rng(SEED)
    old = matrix(draw, 9, 3 * Q, 9, (0, 3**G))
    await Source(dut, "cmd").send([old.command])
    task = cocotb.start_soon(Source(dut, "in").send(old.beats))
    for _ in range(12):
        await RisingEdge(dut.clk_i)
    assert dut.bad_index_o.value
    task.cancel()
    dut.in_valid_i.value = 0
    await reset(dut, running=True)
    assert not dut.bad_index_o.value
    await run(dut, some_matrices(draw), "half")
    assert not dut.bad_index_o.value
