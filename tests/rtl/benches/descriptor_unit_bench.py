# SPDX-License-Identifier: Apache-2.0
"""descriptor_unit: what a run is told, computed from the descriptor in Python's integers; what is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from streams import SEED, Source, reset

from tilewright.edge.contract import FUSE_MODES
from tilewright.edge.program import ENTER, NORM, Buffer, Descriptor, Op, encode

NAMES = ("G", "T", "Q", "Lanes", "WeightWords", "RowBeatsMax", "BlocksMax", "BeatsMax", "RowsMax", "HeadsMax",
         "KvHeadsMax", "HeadBeatsMax", "AttentionBeatsMax")  # fmt: skip
(G, T, Q, LANES, WEIGHT_WORDS, ROW_BEATS, BLOCKS, BEATS, ROWS, HEADS, KV_HEADS, HEAD_BEATS, ATTENTION_BEATS) = (
    int(os.environ[f"RTL_{name.upper()}"]) for name in NAMES
)
# Of run_pkg::run_t, from its highest bit down.
FIELDS = {
    "attend": 1, "enter": 1, "norm": 1, "mode": 3, "inputs": 15, "in_beats": 16, "outputs": 16, "out_beats": 16,
    "blocks": 16, "sweep_beats": 16, "sweep_tail": 16, "vectors": 24, "weight_beats": 24, "weights": 40,
    "mantissa": 17, "exponent": 8, "eps": 47, "heads": 8, "kv_heads": 8, "head_beats": 8, "kv_beats": 16, "rows": 16,
    "first": 13, "source": 40, "side": 40, "side_stride": 40, "side_beats": 16, "target": 40, "target_stride": 40,
    "cache": 40,
}  # fmt: skip
WIDEST = min(16384, ROW_BEATS * LANES, BLOCKS * T * G)
WORST = 200
"""Cycles that a descriptor may take: two divisions of 18 bits and some steps."""
bench = cocotb.test(timeout_time=20, timeout_unit="ms")


@dataclass(frozen=True)
class Settings:
    """The registers that a descriptor is completed with."""

    tokens: int
    first: int
    capacity: int
    bases: tuple[int, ...]
    weights: int
    angles: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Settings:
        capacity = int(rng.choice([1, 4096, rng.integers(1, 4097)]))
        tokens = int(rng.integers(1, min(ROWS, capacity) + 1))
        first = int(rng.choice([0, capacity - tokens, rng.integers(0, capacity - tokens + 1)]))
        places = [int(place) * 2 * LANES for place in rng.integers(0, 1 << 34, 10)]
        return cls(tokens, first, capacity, tuple(places[:8]), places[8], places[9])


def up(value: int, step: int) -> int:
    return -(-value // step)


def draw_linear(rng: np.random.Generator, entered: int) -> Descriptor:
    """One that the build can carry out, large ones among them; ``entered`` inputs are in the store."""
    enter = entered == 0 or rng.random() < 0.6
    inputs = int(rng.choice([1, WIDEST, rng.integers(1, WIDEST + 1)])) if enter else entered
    most = min(BEATS, WEIGHT_WORDS // 2 // up(inputs, T * G)) * Q
    outputs = int(rng.choice([1, most, rng.integers(1, most + 1)]))
    mode, target = int(rng.integers(0, len(FUSE_MODES))), int(rng.integers(1, 8))
    head_beats, kv_heads = int(rng.integers(1, HEAD_BEATS + 1)), int(rng.integers(1, KV_HEADS + 1))
    if target >= Buffer.KEYS:
        head_beats = min(head_beats, most // LANES // kv_heads)
        if head_beats == 0:
            return draw_linear(rng, entered)
        outputs = kv_heads * head_beats * LANES
    return Descriptor(
        Op.LINEAR,
        (ENTER if enter else 0) | (NORM if rng.random() < 0.5 else 0),
        mode,
        int(rng.integers(1, 6)),
        target,
        int(rng.integers(1, 6)),
        inputs,
        outputs,
        int(rng.integers(0, 1 << 26)) * 2 * LANES,
        int(rng.integers(1, 1 << 24)),
        int(rng.integers(1 << 16, 1 << 17)),
        int(rng.integers(-128, 128)),
        int(rng.integers(0, 1 << 32)),
        int(rng.integers(0, 1 << 15)),
        int(rng.integers(1, HEADS + 1)) | kv_heads << 8 | head_beats * LANES << 16,
        int(rng.choice([0, 1, 31, 400])),
    )


def draw_attend(rng: np.random.Generator) -> Descriptor:
    head_beats = int(rng.choice([1, HEAD_BEATS, rng.integers(1, HEAD_BEATS + 1)]))
    heads = int(rng.integers(1, min(HEADS, ATTENTION_BEATS // head_beats) + 1))
    kv_heads = int(rng.choice([n for n in range(1, min(heads, KV_HEADS) + 1) if heads % n == 0]))
    return Descriptor(
        Op.ATTEND,
        source=int(rng.integers(1, 6)),
        target=int(rng.integers(1, 6)),
        mantissa=int(rng.integers(1 << 16, 1 << 17)),
        exponent=int(rng.integers(-128, 128)),
        geometry=heads | kv_heads << 8 | head_beats * LANES << 16,
        layer=int(rng.choice([0, 1, 31, 400])),
    )


def expected(one: Descriptor, at: Settings) -> dict[str, int]:
    """The fields of a run that mean something for this descriptor."""
    heads, kv_heads, size = one.heads
    row_bytes = 2 * LANES
    common = {
        "attend": int(one.op == Op.ATTEND), "mantissa": one.mantissa, "exponent": one.exponent, "rows": at.tokens,
        "first": at.first, "heads": heads, "kv_heads": kv_heads, "head_beats": size // LANES,
    }  # fmt: skip
    if one.op == Op.ATTEND:
        stride = kv_heads * size * 2
        return common | {
            "source": at.bases[one.source],
            "target": at.bases[one.target],
            "out_beats": heads * size // LANES,
            "kv_beats": kv_heads * size // LANES,
            "cache": (one.layer * at.capacity + at.capacity - at.first - at.tokens) * stride,
        }
    out_beats, beats = up(one.outputs, LANES), up(one.outputs, Q)
    blocks = up(one.inputs, T * G)
    found = common | {
        "enter": one.flags & ENTER, "norm": int(one.flags == ENTER | NORM), "mode": one.mode, "inputs": one.inputs,
        "in_beats": up(one.inputs, LANES), "outputs": one.outputs, "out_beats": out_beats, "blocks": blocks,
        "sweep_beats": beats, "sweep_tail": one.outputs - (beats - 1) * Q, "vectors": blocks * beats * Q,
        "weight_beats": one.beats, "weights": at.weights + one.address, "eps": one.eps,
        "target": at.bases[one.target], "target_stride": out_beats * row_bytes,
    }  # fmt: skip
    if one.flags & ENTER:
        found["source"] = at.bases[one.source]
    if one.target >= Buffer.KEYS:
        place = one.layer * at.capacity + at.capacity - 1 - at.first
        found |= {"target": found["target"] + place * out_beats * row_bytes, "target_stride": -out_beats * row_bytes}
    if FUSE_MODES[one.mode] == "rope":
        found |= {"side": at.angles + at.first * size * 2, "side_stride": size * 2, "side_beats": size // LANES}
    elif FUSE_MODES[one.mode] != "bypass":
        found |= {"side": at.bases[one.side], "side_stride": out_beats * row_bytes, "side_beats": out_beats}
    return found


@dataclass
class Unit:
    """The unit, and a source of a descriptor's beats."""

    dut: Any
    source: Source

    @classmethod
    async def start(cls, dut: Any, pattern: str = "always") -> Unit:
        dut.take_i.value = 0
        unit = cls(dut, Source(dut, "in", pattern))
        await reset(dut)
        return unit

    def set(self, at: Settings) -> None:
        for name in ("tokens", "first", "capacity", "weights", "angles"):
            getattr(self.dut, f"{name}_i").value = getattr(at, name)
        self.dut.base_i.value = sum(base << 40 * place for place, base in enumerate(at.bases))

    async def give(self, one: Descriptor, at: Settings) -> tuple[str, dict[str, int]]:
        """What is made of it ("run", "end" or "bad"), and the run."""
        self.set(at)
        data = int.from_bytes(encode([one]).tobytes(), "little")
        bits = 16 * LANES
        beats = [data >> place & (1 << bits) - 1 for place in range(0, 512, bits)]
        self.dut.take_i.value = 1
        sending = cocotb.start_soon(self.source.send(beats))
        for _ in range(WORST):
            await RisingEdge(self.dut.clk_i)
            if self.dut.done_o.value:
                break
        else:
            raise AssertionError(f"no answer in {WORST} cycles to {one}")
        assert sending.done()
        self.dut.take_i.value = 0
        word, fields = int(self.dut.run_o.value), {}
        for name, width in reversed(FIELDS.items()):
            fields[name] = word & (1 << width) - 1
            word >>= width
        kind = "end" if self.dut.end_o.value else "bad" if self.dut.bad_o.value else "run"
        await RisingEdge(self.dut.clk_i)
        assert not self.dut.done_o.value
        return kind, fields


@bench
@cocotb.parametrize(pattern=["always", "half"])
async def runs_are_what_the_descriptor_says(dut, pattern):
    """Large contexts, layers and matrices among them, as far as the build goes."""
    rng = np.random.default_rng(SEED)
    unit, entered = await Unit.start(dut, pattern), 0
    for _ in range(150):
        one, at = draw_attend(rng) if rng.random() < 0.3 else draw_linear(rng, entered), Settings.draw(rng)
        kind, fields = await unit.give(one, at)
        assert kind == "run", f"{one} with {at}"
        wanted = {name: value % (1 << FIELDS[name]) for name, value in expected(one, at).items()}
        assert {name: fields[name] for name in wanted} == wanted, f"{one} with {at}"
        if one.op == Op.LINEAR and one.flags & ENTER:
            entered = one.inputs
    assert (await unit.give(Descriptor(Op.END), Settings(0, 0, 0, (1,) * 8, 1, 1)))[0] == "end"


def wide(**changes: int) -> Descriptor:
    """A linear of one block and one beat of outputs, changed."""
    base = Descriptor(
        Op.LINEAR, ENTER | NORM, 0, Buffer.STREAM, Buffer.QUERY, 0, inputs=min(T * G, LANES), outputs=Q, beats=3,
        mantissa=1 << 16, geometry=1 | 1 << 8 | LANES << 16,
    )  # fmt: skip
    return replace(base, **changes)


ROPE, RESIDUAL = FUSE_MODES.index("rope"), FUSE_MODES.index("residual")
# What is the matter; a linear in which nothing else is; the first value that is too much, and the last that is not.
LINEAR_EDGES: list[tuple[str, dict[str, int], dict[str, int]]] = [
    ("no inputs", {"inputs": 0}, {"inputs": 1}),
    ("no outputs", {"outputs": 0}, {"outputs": 1}),
    ("beats of outputs", {"outputs": BEATS * Q + 1}, {"outputs": min(BEATS, WEIGHT_WORDS // 2) * Q}),
    ("outputs of 16 bits", {"outputs": (1 << 16) + 1}, {}),
    ("outputs of 32 bits", {"outputs": (1 << 31) + Q}, {}),
    ("inputs of 15 bits", {"inputs": (1 << 15) + 1}, {}),
    ("inputs of 32 bits", {"inputs": (1 << 31) + 1}, {}),
    ("a row", {"inputs": WIDEST + 1}, {"inputs": WIDEST}),
    ("fuse mode", {"mode": len(FUSE_MODES)}, {"mode": len(FUSE_MODES) - 1, "side": Buffer.GATE}),
    ("a large fuse mode", {"mode": 1 << 8}, {}),
    ("no weights", {"beats": 0}, {"beats": 1}),
    ("beats of weights", {"beats": 1 << 24}, {"beats": (1 << 24) - 1}),
    ("a layer", {"layer": 1 << 16}, {"layer": (1 << 16) - 1}),
    ("no target", {"target": Buffer.NONE}, {"target": Buffer.STREAM}),
    ("a target", {"target": 8}, {}),
    ("no source", {"source": Buffer.NONE}, {}),
    ("keys as a source", {"source": Buffer.KEYS}, {"source": Buffer.GATED}),
    ("a large source", {"source": 1 + (1 << 3)}, {}),
    ("no side", {"mode": RESIDUAL, "side": Buffer.NONE}, {"mode": RESIDUAL, "side": Buffer.GATED}),
    ("values as a side", {"mode": RESIDUAL, "side": Buffer.VALUES}, {}),
    ("a head", {"mode": ROPE, "geometry": HEAD_BEATS + 1 << 16 + LANES.bit_length() - 1},
     {"mode": ROPE, "geometry": HEAD_BEATS * LANES << 16}),
    ("part of a beat of a head", {"mode": ROPE, "geometry": LANES + 2 << 16}, {}),
    ("no head", {"mode": ROPE, "geometry": 0}, {"geometry": 0}),
    ("a cache's row", {"target": Buffer.KEYS, "outputs": LANES + 1}, {"target": Buffer.KEYS, "outputs": LANES}),
    ("weights inside a beat", {"address": LANES}, {"address": 2 * LANES}),
    ("another opcode", {"op": 4}, {}),
    ("opcode 0", {"op": 0}, {}),
    ("an opcode's high bits", {"op": 1 << 8 | Op.LINEAR}, {}),
]  # fmt: skip


@bench
async def what_is_too_much_is_refused(dut):
    """Each limit of a linear from both sides; then a linear that is not."""
    unit = await Unit.start(dut)
    at = Settings(1, 0, 8, tuple(0x100 * place for place in range(8)), 0x10000, 0x20000)
    for what, wrong, right in LINEAR_EDGES:
        kind, _ = await unit.give(wide(**wrong), at)
        assert kind == "bad", what
        kind, _ = await unit.give(wide(**right), at)
        assert kind == "run", what


def shape(heads: int, kv_heads: int, size: int, **changes: int) -> Descriptor:
    geometry = heads | kv_heads << 8 | size << 16
    return replace(Descriptor(Op.ATTEND, source=2, target=3, mantissa=1 << 16, geometry=geometry), **changes)


@bench
async def attentions_that_cannot_be_are_refused(dut):
    """Of heads, of rows, of places."""
    unit = await Unit.start(dut)
    bases = tuple(0x100 * place for place in range(8))
    at = Settings(1, 0, 8, bases, 0, 0)
    heads = min(HEADS, ATTENTION_BEATS)
    refused = [
        shape(0, 1, LANES), shape(1, 0, LANES), shape(1, 1, 0), shape(1, 1, LANES // 2), shape(HEADS + 1, 1, LANES),
        shape(heads, KV_HEADS + 1, LANES), shape(3, 2, LANES), shape(1, 2, LANES),
        shape(1, 1, (HEAD_BEATS + 1) * LANES), shape(1, 1, LANES, source=0), shape(1, 1, LANES, source=6),
        shape(1, 1, LANES, target=0),
        shape(1, 1, LANES, target=7), shape(1, 1, LANES, layer=1 << 16),
    ]  # fmt: skip
    if HEADS * HEAD_BEATS > ATTENTION_BEATS:
        refused.append(shape(ATTENTION_BEATS // HEAD_BEATS + 1, 1, HEAD_BEATS * LANES))
    for one in refused:
        assert (await unit.give(one, at))[0] == "bad", one
    for one in (shape(1, 1, LANES), shape(heads, 1, LANES), shape(2, 2, LANES), shape(1, 1, HEAD_BEATS * LANES)):
        assert (await unit.give(one, at))[0] == "run", one
    for place in (2, 3, 6, 7):
        odd = replace(at, bases=(*bases[:place], bases[place] + LANES, *bases[place + 1 :]))
        assert (await unit.give(shape(1, 1, LANES), odd))[0] == "bad", place


@bench
async def settings_that_cannot_be_are_refused(dut):
    """Tokens, positions, capacity; places of what is used, and only of that."""
    unit = await Unit.start(dut)
    bases = tuple(0x100 * place for place in range(8))
    at = Settings(1, 0, 8, bases, 0, 0)
    whole = replace(at, capacity=4096)
    for wrong, right in (
        (replace(at, tokens=0), at),
        (replace(whole, tokens=ROWS + 1), replace(whole, tokens=ROWS)),
        (replace(at, first=8), replace(at, first=7)),
        (replace(at, tokens=2, first=7), replace(at, tokens=2, first=6)),
        (replace(at, first=(1 << 32) - 1), at),
        (replace(at, tokens=1 << 31, first=1 << 31), at),
        (replace(at, capacity=4097), whole),
        (replace(at, weights=2), replace(at, angles=2)),
        (replace(at, bases=(*bases[:2], 0x202, *bases[3:])), replace(at, bases=(*bases[:4], 0x402, *bases[5:]))),
    ):
        assert (await unit.give(wide(), wrong))[0] == "bad", wrong
        assert (await unit.give(wide(), right))[0] == "run", right
    assert (await unit.give(wide(mode=ROPE), replace(at, angles=2)))[0] == "bad"


@bench
async def a_row_that_nobody_entered_is_not_multiplied(dut):
    """After a reset, and with other inputs than the row has."""
    unit = await Unit.start(dut)
    at = Settings(1, 0, 8, tuple(0x100 * place for place in range(8)), 0, 0)
    inputs = wide().inputs
    assert (await unit.give(wide(flags=0), at))[0] == "bad"
    assert (await unit.give(wide(), at))[0] == "run"
    assert (await unit.give(wide(flags=0), at))[0] == "run"
    assert (await unit.give(wide(flags=0, inputs=inputs - 1), at))[0] == "bad"
    await reset(dut, running=True)
    assert (await unit.give(wide(flags=0), at))[0] == "bad"
