# SPDX-License-Identifier: Apache-2.0
"""Cycles of a run of the accelerator as its RTL is scheduled: `rtl/src`, ports of `16 * lanes` bits that never pause.

What grows with a model is counted from shapes. What does not are the lengths of the pipelines between a command and
its end: the constants of :class:`Pipelines`. Each is the sum of what its comment names, read off the counters of one
run; `tests/edge` compares the whole with other shapes' counters.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.edge.contract import Layer, Linear, Tiling
from tilewright.edge.contract.stream import beat_count


@dataclass(frozen=True)
class Pipelines:
    """Cycles that do not depend on shapes, for memory that answers ``latency`` cycles after an address."""

    latency: int = 20

    @property
    def descriptor(self) -> int:
        """Address, answer, two divisions of 18 bits, products and checks, and the way to the next one."""
        return 51 + self.latency

    @property
    def load(self) -> int:
        """The three ports' quads, gearboxes, and 8 cycles in which the last groups settle."""
        return 28 + self.latency

    @property
    def first_row(self) -> int:
        """Address and answer, stores, division and root (51), the quantizer's division (31), a block's gearbox."""
        return 108 + self.latency

    @property
    def first_plain_row(self) -> int:
        """The same of a row that is not normed: no root."""
        return 41 + self.latency

    next_row: int = 69
    """Between two rows that are normed: division and root, pipelines of three passes, the maximum's way."""
    next_plain_row: int = 36
    """Between two rows that are not: the quantizer's division and its pipeline."""

    @property
    def last_row(self) -> int:
        """From a row's last look-up to memory's answer: tree, gearbox, both roundings, a burst's wait, the answer."""
        return 38 + self.latency

    @property
    def attention(self) -> int:
        """Addresses and answers of the first block, and memory's answer to its last row."""
        return 14 + 2 * self.latency

    block: int = 18
    """Pipelines of a block of queries: alignment, score, step, sums, rounding."""
    reciprocal: int = 37
    """Of a head: a division of 33 bits, its operands and its store."""
    key_period: int = 8
    """The least distance of two keys: a sum is back in its store."""


def entry_cycles(linear: Linear, tiling: Tiling, pipelines: Pipelines) -> tuple[int, int]:
    """Cycles until a first row is quantized, and between two."""
    beats = -(-linear.weights.inputs // tiling.lanes)
    if linear.norm is None:
        return pipelines.first_plain_row + 2 * beats, pipelines.next_plain_row + beats
    return pipelines.first_row + 4 * beats, pipelines.next_row + 3 * beats


def linear_cycles(
    linear: Linear, tiling: Tiling, tokens: int, *, enters: bool, fill: int, pipelines: Pipelines
) -> dict[str, int]:
    """Load, and rows from the first one's coming to memory's answer to the last.

    Args:
        fill: cycles of writing tables that a block waits for: 3**g, or 0 with two sets of tables and as many beats.
    """
    weights = linear.weights
    beats = -(-weights.outputs // tiling.q)
    blocks = tiling.blocks(weights.inputs)
    sweep = blocks * (beats + fill) + 1 if fill else tiling.codes + blocks * max(beats, tiling.codes) + 1
    first, period = entry_cycles(linear, tiling, pipelines) if enters else (0, 0)
    done = 0
    for row in range(tokens):
        done = max(done, first + row * period) + sweep
    rows = done + pipelines.last_row
    norms = 0 if linear.norm is None else len(linear.norm)
    return {"load": beat_count(weights, norms) + pipelines.load, "rows": rows}


def attention_cycles(layer: Layer, tiling: Tiling, first: int, tokens: int, pipelines: Pipelines) -> int:
    """Of ``tokens`` queries behind ``first`` positions: blocks of P from the newest down."""
    row = layer.heads * layer.head_size // tiling.lanes
    keys = layer.kv_heads * layer.head_size // tiling.lanes
    total, left = pipelines.attention, tokens
    while left:
        queries = min(tiling.p, left)
        total += pipelines.block + 2 * queries * row + keys + layer.heads * pipelines.reciprocal
        total += (first + left) * max(row, pipelines.key_period)
        left -= queries
    return total


def layer_cycles(
    layer: Layer, tiling: Tiling, first: int, tokens: int, *, banks: int = 1, pipelines: Pipelines | None = None
) -> dict[str, int]:
    """Cycles of a layer for a chunk of tokens by part: descriptors, load, rows, attend; their sum is the run's."""
    pipelines = pipelines or Pipelines()
    fill = tiling.codes if banks == 1 else 0
    parts = {"descriptors": 9 * pipelines.descriptor, "load": 0, "rows": 0}
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        enters = name in ("q", "o", "gate", "down")
        found = linear_cycles(getattr(layer, name), tiling, tokens, enters=enters, fill=fill, pipelines=pipelines)
        for part, cycles in found.items():
            parts[part] += cycles
    return parts | {"attend": attention_cycles(layer, tiling, first, tokens, pipelines)}
