# SPDX-License-Identifier: Apache-2.0
"""half_pack against the contract's Python, and against the double's own rounding where it is finite."""

from __future__ import annotations

import os

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from streams import SEED, start_clock

from tilewright.edge import contract
from tilewright.edge.contract import half

WIDTH, EXPONENT_BITS = int(os.environ["RTL_WIDTH"]), int(os.environ["RTL_EXPONENTBITS"])
LATENCY = 3


def cases(draw: np.random.Generator) -> list[tuple[int, int]]:
    """Every length of value at exponents around the ends of float16, ties included."""
    found = []
    low, high = -(1 << (EXPONENT_BITS - 1)), (1 << (EXPONENT_BITS - 1)) - 1
    for length in range(WIDTH):
        for near in (-24, -14, 5, 16):
            exponent = int(np.clip(near - length + draw.integers(-3, 4), low, high))
            value = int(draw.integers(0, 1 << length)) if length else 0
            found += [(sign * (value | (1 << length >> 1)), exponent) for sign in (1, -1)]
    for place in range(11, WIDTH - 1):
        half = 1 << (place - 11)
        found += [((odd << (place - 10)) + half, -place) for odd in (1024, 1025, 2047)]
    found += [(0, low), (0, high), ((1 << (WIDTH - 1)) - 1, high), (-(1 << (WIDTH - 1)) + 1, low), (1, -25), (3, -25)]
    found += [
        (int(draw.integers(-(1 << (WIDTH - 1)) + 1, 1 << (WIDTH - 1))), int(draw.integers(low, high + 1)))
        for _ in range(2000)
    ]
    return [(v, int(np.clip(e, low, high))) for v, e in found if abs(v) < 1 << (WIDTH - 1)]


@cocotb.test()
async def every_result_is_the_contracts(dut):
    """One result a cycle, three cycles later."""
    given = cases(np.random.default_rng(SEED))
    status = [contract.StatusRegister() for _ in given]
    wanted = [int(half.pack(np.array([v]), e, s).view(np.uint16)[0]) for (v, e), s in zip(given, status, strict=True)]
    start_clock(dut)
    dut.enable_i.value = 1
    got, saturated = [], []
    for value, exponent in [*given, *[(0, 0)] * LATENCY]:
        dut.value_i.value, dut.exponent_i.value = value, exponent
        await RisingEdge(dut.clk_i)
        got.append(int(dut.half_o.value))
        saturated.append(bool(dut.saturated_o.value))
    # A value read at an edge is what stood before it: the registers are read three edges after their input was set.
    got, saturated = got[LATENCY:], saturated[LATENCY:]
    wrong = [(*case, hex(a), hex(b)) for case, a, b in zip(given, got, wanted, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(given)} differ (value, exponent, got, wanted): {wrong[:8]}"
    assert saturated == [contract.Status.SATURATED in s.value for s in status]
