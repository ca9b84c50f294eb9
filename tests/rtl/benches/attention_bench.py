# SPDX-License-Identifier: Apache-2.0
"""attention against the contract's Python."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from numpy.typing import NDArray
from streams import PATTERNS, SEED, CycleCounter, Sink, Source, reset

from tilewright.edge import contract
from tilewright.edge.contract import Factor, StatusRegister
from tilewright.edge.contract.softmax import score_factor

LANES, P = int(os.environ["RTL_LANES"]), int(os.environ["RTL_P"])
HEADS_MAX, KV_MAX, BEATS_MAX = (int(os.environ[f"RTL_{n}"]) for n in ("HEADSMAX", "KVHEADSMAX", "BEATSMAX"))
RECIPROCAL, PERIOD = 36, 8
Half = NDArray[np.float16]


def vectors(rows: Half) -> list[int]:
    """Beats of rows `[rows, heads, size]`."""
    data = np.ascontiguousarray(rows).reshape(-1, LANES)
    return [int.from_bytes(piece.tobytes(), "little") for piece in data]


@dataclass
class Block:
    """Queries `[queries, H, D]` oldest first, keys and values `[keys, Hkv, D]`; the last query is at the last key."""

    q: Half
    k: Half
    v: Half
    factor: Factor

    @property
    def first(self) -> int:
        return len(self.k) - len(self.q)

    @property
    def row_beats(self) -> int:
        return self.q.shape[1] * self.q.shape[2] // LANES

    def wanted(self, status: StatusRegister) -> Half:
        """Newest first."""
        return contract.attention(self.q, self.k, self.v, first=self.first, factor=self.factor, status=status)[::-1]

    def cycles(self) -> int:
        """The formula in the unit's header, and the queries' coming."""
        heads = self.q.shape[1]
        keys = len(self.k) * max(self.row_beats, PERIOD)
        return 2 * len(self.q) * self.row_beats + keys + heads * RECIPROCAL


def block(
    draw: np.random.Generator, queries: int, keys: int, heads: int, kv_heads: int, beats: int, kind: str
) -> Block:
    """Values of a kind: ordinary, wild exponents, zeros, extremes of one sign, subnormal, scores that clamp."""
    size = beats * LANES
    shapes = (queries, heads, size), (keys, kv_heads, size), (keys, kv_heads, size)
    q, k, v = (draw.standard_normal(shape) for shape in shapes)
    factor = score_factor(size)
    if kind == "wild":
        q, k, v = (x * 2.0 ** draw.integers(-12, 8, x.shape) for x in (q, k, v))
    elif kind == "zeros":
        q, k, v = q * 0, k * 0, v * 0
    elif kind == "same sign":
        q, k, v = (np.full(x.shape, 8.0) for x in (q, k, v))
        v = v * 0 - 65504
    elif kind == "subnormal":
        q, k, v = (x * 2.0**-22 for x in (q, k, v))
    elif kind == "clamped":
        q, k = np.full(q.shape, 60000.0), k * 30000
    elif kind == "jumps":
        v = v * 2.0 ** draw.integers(-24, 15, (keys, kv_heads, 1))
        k = k * 2.0 ** draw.integers(-3, 4, (keys, kv_heads, 1))
    return Block(*(x.clip(-65504, 65504).astype(np.float16) for x in (q, k, v)), factor)


def blocks(draw: np.random.Generator) -> list[Block]:
    heads, beats = HEADS_MAX, BEATS_MAX // HEADS_MAX
    found = [
        block(draw, P, P, heads, KV_MAX, beats, "ordinary"),
        block(draw, 1, 1, heads, KV_MAX, beats, "ordinary"),
        block(draw, 1, 9, heads, 1, beats, "jumps"),
        block(draw, P, P + 7, heads, KV_MAX, beats, "wild"),
        block(draw, 1, 30, 1, 1, 1, "wild"),
        block(draw, min(P, 2), 5, KV_MAX, KV_MAX, beats, "jumps"),
    ]
    found += [block(draw, P, P + 3, heads, KV_MAX, beats, kind) for kind in ("zeros", "same sign", "subnormal")]
    return found


class Ports:
    """Sources and the sink of a test."""

    def __init__(self, dut, pattern: str) -> None:
        names = ("cmd", "q", "k", "v")
        self.sources = {name: Source(dut, name, pattern, SEED + i) for i, name in enumerate(names)}
        self.sink = Sink(dut, "out", ("data", "last"), pattern)

    def send(self, given: list[Block]) -> None:
        commands, streams = [], {"q": [], "k": [], "v": []}
        for one in given:
            queries, heads, size = one.q.shape
            commands.append(
                {
                    "heads": heads, "kv_heads": one.k.shape[1], "head_beats": size // LANES, "queries": queries,
                    "keys": len(one.k), "mantissa": one.factor.mantissa, "exponent": one.factor.exponent,
                }
            )  # fmt: skip
            for name, rows in (("q", one.q), ("k", one.k), ("v", one.v)):
                streams[name] += vectors(rows[::-1])
        self.tasks = [cocotb.start_soon(self.sources["cmd"].send(commands))]
        self.tasks += [cocotb.start_soon(self.sources[name].send(beats)) for name, beats in streams.items()]

    async def take(self, one: Block) -> Half:
        """The block's rows, newest first; checks where rows end."""
        beats = len(one.q) * one.row_beats
        got = await self.sink.take(beats, 60 * (beats + one.cycles()) + 1000)
        assert [beat["last"] for beat in got] == ([0] * (one.row_beats - 1) + [1]) * len(one.q)
        data = b"".join(beat["data"].to_bytes(2 * LANES, "little") for beat in got)
        return np.frombuffer(data, np.float16).reshape(one.q.shape)


def check(got: Half, one: Block, status: StatusRegister, what: str = "") -> None:
    np.testing.assert_array_equal(got.view(np.uint16), one.wanted(status).view(np.uint16), err_msg=what)


@cocotb.test()
@cocotb.parametrize(pattern=PATTERNS)
async def blocks_equal_the_contract(dut, pattern):
    """Every kind of block, back to back, of different shapes; and the status of all."""
    await reset(dut)
    given, ports, status = blocks(np.random.default_rng(SEED)), Ports(dut, pattern), StatusRegister()
    ports.send(given)
    for index, one in enumerate(given):
        check(await ports.take(one), one, status, f"block {index}")
    assert bool(dut.saturated_o.value) == (contract.Status.SATURATED in status.value)
    assert bool(dut.score_clamp_o.value) == (contract.Status.SCORE_CLAMP in status.value)
    assert not dut.nonfinite_o.value


@cocotb.test()
async def a_long_context_is_the_contracts(dut):
    """Sums and references over some hundred keys."""
    await reset(dut)
    given = [
        block(np.random.default_rng(SEED), min(P, 3), 300, HEADS_MAX, 1, 1, kind) for kind in ("jumps", "same sign")
    ]
    ports = Ports(dut, "always")
    ports.send(given)
    for one in given:
        check(await ports.take(one), one, StatusRegister())


@cocotb.test()
async def scores_out_of_range_are_clamped(dut):
    """And seen in the status, but not those of keys that a query skips."""
    await reset(dut)
    one = block(np.random.default_rng(SEED), P, P + 4, HEADS_MAX, KV_MAX, BEATS_MAX // HEADS_MAX, "clamped")
    ports, status = Ports(dut, "half"), StatusRegister()
    ports.send([one])
    check(await ports.take(one), one, status)
    assert contract.Status.SCORE_CLAMP in status.value
    assert dut.score_clamp_o.value


@cocotb.test()
async def not_finite_is_taken_as_the_contract_says(dut):
    """In queries, keys and values."""
    for index, name in enumerate(("q", "k", "v")):
        await reset(dut, running=index > 0)
        one = block(np.random.default_rng(SEED), P, P + 2, HEADS_MAX, KV_MAX, BEATS_MAX // HEADS_MAX, "ordinary")
        getattr(one, name)[0, 0, :3] = [np.nan, np.inf, -np.inf][: min(3, LANES)]
        ports = Ports(dut, "half")
        ports.send([one])
        check(await ports.take(one), one, StatusRegister(), name)
        assert dut.nonfinite_o.value


@cocotb.test()
async def factors_of_every_size_are_taken(dut):
    """The exponents of the command, at both ends of the models' range and of the port's."""
    await reset(dut)
    draw, given = np.random.default_rng(SEED), []
    for factor in (Factor.of(2.0**-100), Factor.of(2.0**100), Factor(65537, -128), Factor(131071, 127)):
        given.append(block(draw, P, P + 2, HEADS_MAX, KV_MAX, BEATS_MAX // HEADS_MAX, "ordinary"))
        given[-1].factor = factor
    for scale in (2.0**-10, 0.0):
        given.append(replace(given[0], q=(given[0].q * scale).astype(np.float16)))
    ports = Ports(dut, "always")
    ports.send(given)
    for index, one in enumerate(given):
        check(await ports.take(one), one, StatusRegister(), f"block {index}")


@cocotb.test()
async def a_prompt_is_its_steps(dut):
    """P queries together are the same bits as one by one."""
    await reset(dut)
    one = block(np.random.default_rng(SEED), P, P + 6, HEADS_MAX, KV_MAX, BEATS_MAX // HEADS_MAX, "jumps")
    steps = [
        Block(one.q[i : i + 1], one.k[: one.first + i + 1], one.v[: one.first + i + 1], one.factor) for i in range(P)
    ]
    ports = Ports(dut, "always")
    ports.send([one, *steps])
    together = await ports.take(one)
    for i, step in enumerate(steps):
        np.testing.assert_array_equal((await ports.take(step))[0].view(np.uint16), together[P - 1 - i].view(np.uint16))


@cocotb.test()
async def a_reset_in_a_block_leaves_nothing_behind(dut):
    """In each of its phases."""
    await reset(dut)
    one = block(np.random.default_rng(SEED), P, P + 6, HEADS_MAX, KV_MAX, BEATS_MAX // HEADS_MAX, "wild")
    for cycles in (3, P * one.row_beats + 20, one.cycles() - 20, one.cycles() + 4):
        ports = Ports(dut, "always")
        ports.send([one])
        for _ in range(cycles):
            await RisingEdge(dut.clk_i)
        for task in ports.tasks:
            task.cancel()
        for name in ("cmd", "q", "k", "v"):
            getattr(dut, f"{name}_valid_i").value = 0
        await reset(dut, running=True)
        assert not dut.out_valid_o.value
        ports = Ports(dut, "always")
        ports.send([one])
        check(await ports.take(one), one, StatusRegister(), f"after {cycles}")


@cocotb.test()
async def cycles_are_the_formulas(dut):
    """Without pauses, for one query and for P; the rest is pipelines and the first key's coming."""
    for index, queries in enumerate((1, P)):
        await reset(dut, running=index > 0)
        one = block(np.random.default_rng(SEED), queries, 40, HEADS_MAX, 1, BEATS_MAX // HEADS_MAX, "ordinary")
        ports = Ports(dut, "always")
        counter = CycleCounter(dut)
        ports.send([one])
        await ports.take(one)
        first_key = one.k.shape[1] * one.k.shape[2] // LANES
        assert one.cycles() <= counter.count <= one.cycles() + first_key + 48, (counter.count, one.cycles())
