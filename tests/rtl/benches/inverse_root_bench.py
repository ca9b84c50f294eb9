# SPDX-License-Identifier: Apache-2.0
"""inverse_root against the contract's Python, over all lengths of its operands."""

from __future__ import annotations

import math
import random

import cocotb
from cocotb.triggers import ReadOnly, RisingEdge
from streams import SEED, reset

from tilewright.edge.contract.rows import MAX_WIDTH, inverse_root

MOST = (1 << 49) - 1
CYCLES = 3 + 34 + 17 + 2
"""From the start: at most three tries of k, division, root, and a register on either side."""


def cases(draw: random.Random) -> list[tuple[int, int]]:
    """(total, width): both ends, every length of a total, quotients next to squares."""
    found = [(total, width) for total in (1, 2, 3, MOST - 1, MOST) for width in (1, 2, 3, MAX_WIDTH - 1, MAX_WIDTH)]
    for length in range(1, 50):
        for total in (1 << (length - 1), (1 << length) - 1, draw.getrandbits(length) | 1 << (length - 1)):
            found.append((total, draw.randint(1, MAX_WIDTH)))
    for _ in range(40):
        # width 2^k / total just below, at and above the square of a root of 17 bits
        root, width = draw.randint(1 << 16, (1 << 17) - 1), draw.randint(1, MAX_WIDTH)
        near = max(1, (width << draw.randrange(34, 60, 2)) // (root * root))
        found += [(min(MOST, max(1, near + step)), width) for step in (-1, 0, 1)]
    found += [(1 << place, 1 << (place % 15)) for place in range(49)]
    return found


@cocotb.test()
async def roots_equal_the_contract(dut):
    """Value and exponent, in the cycles that the header says, and nothing is held between starts."""
    dut.start_i.value = 0
    await reset(dut)
    for total, width in cases(random.Random(SEED)):
        dut.start_i.value, dut.total_i.value, dut.width_i.value = 1, total, width
        await RisingEdge(dut.clk_i)
        dut.start_i.value = 0
        for _ in range(CYCLES):
            await ReadOnly()
            if dut.done_o.value:
                break
            await RisingEdge(dut.clk_i)
        assert dut.done_o.value, f"total {total}, width {width}: not done after {CYCLES} cycles"
        root, k = inverse_root(total, width)
        assert (int(dut.root_o.value), 2 * int(dut.half_k_o.value)) == (root, k), f"total {total}, width {width}"
        assert root == math.isqrt((width << k) // total)
        await RisingEdge(dut.clk_i)
