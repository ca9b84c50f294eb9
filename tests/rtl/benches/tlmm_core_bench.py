# SPDX-License-Identifier: Apache-2.0
"""tlmm_core against an int64 product: values, order, back-pressure, cycles."""

from __future__ import annotations

import os

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

G, T, Q, BANKS = (int(os.environ[f"RTL_{name}"]) for name in ("G", "T", "Q", "BANKS"))
INDEX_BITS = int(3**G - 1).bit_length()


def bits(values: np.ndarray, width: int) -> int:
    """Numbers side by side in one vector, the first in the lowest bits."""
    vector = 0
    for place, value in enumerate(values.reshape(-1).tolist()):
        vector |= (value & ((1 << width) - 1)) << (place * width)
    return vector


def indices(weights: np.ndarray) -> np.ndarray:
    """Base-3 codes [K, N / G] of ternary weights [N, K], the first digit least."""
    digits = (weights.T.astype(np.int64) + 1).reshape(weights.shape[1], -1, G)
    return digits @ 3 ** np.arange(G)


class Row:
    """One row's command, streams and totals."""

    def __init__(self, activations: np.ndarray, weights: np.ndarray) -> None:
        inputs, outputs = weights.shape
        self.blocks = inputs // (T * G)
        self.beats = -(-outputs // Q)
        self.tail = outputs - (self.beats - 1) * Q
        self.command = {"beats": self.beats, "tail": self.tail, "blocks": self.blocks}
        self.activations = [bits(block, 8) for block in activations.reshape(self.blocks, T * G)]
        codes = np.full((self.beats * Q, inputs // G), 3**G // 2)
        codes[:outputs] = indices(weights)
        codes = codes.reshape(self.beats, Q, self.blocks, T)
        self.weights = [
            bits(codes[beat, :, block], INDEX_BITS) for block in range(self.blocks) for beat in range(self.beats)
        ]
        self.totals = activations.astype(np.int64) @ weights.astype(np.int64)


def random_row(draw: np.random.Generator, blocks: int, outputs: int, extreme: bool = False) -> Row:
    inputs = blocks * T * G
    if extreme:
        activations = np.full(inputs, draw.choice([-128, 127]))
        return Row(activations, np.full((inputs, outputs), draw.choice([-1, 1])))
    activations = draw.choice(np.array([-128, -127, -1, 0, 1, 127, *range(-100, 100)]), inputs)
    return Row(activations, draw.integers(-1, 2, (inputs, outputs)))


def totals(beats: list[dict[str, int]]) -> np.ndarray:
    """Kept lanes of the beats, signed."""
    lanes = [
        (beat["data"] >> (32 * lane)) & 0xFFFFFFFF for beat in beats for lane in range(Q) if (beat["keep"] >> lane) & 1
    ]
    return np.array(lanes, np.uint32).view(np.int32).astype(np.int64)


async def run(dut, rows: list[Row], pattern: str, late: int = 0) -> int:
    """Send the rows back to back, check every total; cycles from the first command to the last total.

    Args:
        late: cycles that the weights wait.
    """
    sources = [Source(dut, prefix, pattern, SEED + i) for i, prefix in enumerate(("cmd", "act", "w"))]
    sink = Sink(dut, "out", ("data", "keep", "last"), pattern)
    await RisingEdge(dut.clk_i)
    counter = CycleCounter(dut)
    cocotb.start_soon(sources[0].send(row.command for row in rows))
    cocotb.start_soon(sources[1].send(block for row in rows for block in row.activations))
    for _ in range(late):
        await RisingEdge(dut.clk_i)
    cocotb.start_soon(sources[2].send(beat for row in rows for beat in row.weights))
    for row in rows:
        work = row.blocks * (row.beats + 3**G) + 64
        beats = await sink.take(row.beats, 40 * work)
        assert [beat["last"] for beat in beats] == [0] * (row.beats - 1) + [1]
        assert [beat["keep"] for beat in beats[:-1]] == [(1 << Q) - 1] * (row.beats - 1)
        assert beats[-1]["keep"] == (1 << row.tail) - 1
        np.testing.assert_array_equal(totals(beats), row.totals)
    return counter.count


@cocotb.test()
@cocotb.parametrize(pattern=PATTERNS)
async def rows_back_to_back(dut, pattern):
    """Different shapes, tails, one output, one block, extremes of one sign."""
    draw = np.random.default_rng([SEED, PATTERNS.index(pattern)])
    await reset(dut)
    shapes = [(1, 1), (2, Q), (3, Q + 1), (1, 3 * Q - 1), (2, 2 * Q)]
    rows = [random_row(draw, blocks, outputs) for blocks, outputs in shapes]
    rows += [random_row(draw, 2, Q, extreme=True) for _ in range(2)]
    await run(dut, rows, pattern)
    assert not dut.busy_o.value


@cocotb.test()
async def blocks_follow_each_other_without_a_fill_between(dut):
    """All tables are full before the first weights come, so an output is visited again as early as can be."""
    draw = np.random.default_rng(SEED)
    for number, outputs in enumerate((1, Q + 1, 3 * Q)):
        await reset(dut, running=number > 0)
        await run(dut, [random_row(draw, BANKS + 1, outputs)], "always", late=BANKS * 3**G + 8)


@cocotb.test()
async def cycles_are_those_of_the_model(dut):
    """Without pauses a row takes what the module's header says, and a fixed number of cycles for the pipeline."""
    draw = np.random.default_rng(SEED)
    extra = set()
    for number, (blocks, outputs) in enumerate(((1, 8 * Q), (4, 8 * Q), (3, 40 * Q), (2, 3 * Q))):
        await reset(dut, running=number > 0)
        row = random_row(draw, blocks, outputs)
        taken = await run(dut, [row], "always")
        fill, sweep = 3**G, row.beats
        model = blocks * (fill + sweep) if BANKS == 1 else fill + (blocks - 1) * max(fill, sweep) + sweep
        extra.add(taken - model)
    tree = (T - 1).bit_length() // 2
    assert len(extra) == 1, f"cycles beyond the model differ: {extra}"
    assert extra.pop() <= 10 + tree


@cocotb.test()
async def reset_in_the_middle_of_a_row(dut):
    """What follows a reset is as if nothing had been."""
    draw = np.random.default_rng(SEED)
    await reset(dut)
    row = random_row(draw, 2, 4 * Q)
    tasks = [
        cocotb.start_soon(Source(dut, prefix).send(beats))
        for prefix, beats in (("cmd", [row.command]), ("act", row.activations), ("w", row.weights))
    ]
    for _ in range(3**G + 3):
        await RisingEdge(dut.clk_i)
    assert dut.busy_o.value
    for task in tasks:
        task.cancel()
    for prefix in ("cmd", "act", "w"):
        getattr(dut, f"{prefix}_valid_i").value = 0
    await reset(dut, running=True)
    await run(dut, [random_row(draw, 1, 2 * Q + 1)], "half")


@cocotb.test()
async def codes_of_no_weights_count_as_nothing(dut):
    """An index past the last group of digits reads zero."""
    await reset(dut)
    draw = np.random.default_rng(SEED)
    row = random_row(draw, 1, Q)
    unused = (1 << INDEX_BITS) - 1
    if unused < 3**G:
        return
    row.weights = [bits(np.full(Q * T, unused), INDEX_BITS)]
    row.totals = np.zeros(Q, np.int64)
    await run(dut, [row], "always")
