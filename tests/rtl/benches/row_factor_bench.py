# SPDX-License-Identifier: Apache-2.0
"""row_factor against the contract's Python, ties among its roundings."""

from __future__ import annotations

import random

import cocotb
from cocotb.triggers import ReadOnly, RisingEdge
from streams import SEED, start_clock

from tilewright.edge.contract import Factor
from tilewright.edge.contract.rows import row_factor


def ties(draw: random.Random, count: int) -> list[tuple[int, int]]:
    """(scale, mantissa) whose product lies halfway between two of 17 bits, for an odd mantissa of the scale."""
    found = []
    while len(found) < count:
        scale = draw.randrange(0x00A9, 0x7C00, 2)
        significand = (scale & 0x3FF) | (0x400 if scale >> 10 else 0)
        for dropped in (10, 11):
            half = (1 << (dropped - 1)) * pow(significand, -1, 1 << dropped) % (1 << dropped)
            mantissa = (1 << 16) + (draw.randrange(0, 1 << 16) >> dropped << dropped) + half
            if (significand * mantissa).bit_length() == 17 + dropped:
                found.append((scale, mantissa))
    return found


def cases(draw: random.Random) -> list[tuple[int, int]]:
    ends = [(scale, m) for scale in (0x00A8, 0x03FF, 0x0400, 0x3C00, 0x7BFF) for m in (1 << 16, (1 << 17) - 1)]
    # 1023/1024 of a power of two times nearly two: the rounding carries into the next power of two.
    carries = [(0x3C00 | low, ((1 << 28) - 1) // (1024 + low)) for low in range(1, 1024, 31)]
    drawn = [(draw.randrange(0x00A8, 0x7C00), draw.randrange(1 << 16, 1 << 17)) for _ in range(500)]
    return ends + [(s, m) for s, m in carries if m < 1 << 17] + ties(draw, 200) + drawn


@cocotb.test()
async def factors_equal_the_contract(dut):
    """Two registers after the start, over the exponents that a descriptor can hold."""
    draw = random.Random(SEED)
    start_clock(dut)
    halfway = carried = 0
    for scale, mantissa in cases(draw):
        exponent = draw.randint(-128, 127)
        dut.start_i.value, dut.scale_i.value = 1, scale
        dut.mantissa_i.value, dut.exponent_i.value = mantissa, exponent
        await RisingEdge(dut.clk_i)
        dut.start_i.value = 0
        await RisingEdge(dut.clk_i)
        await ReadOnly()
        wanted = row_factor(scale, Factor(mantissa, exponent))
        got = int(dut.mantissa_o.value), dut.exponent_o.value.to_signed()
        assert got == (wanted.mantissa, wanted.exponent), f"scale {scale:#x}, mantissa {mantissa}, exponent {exponent}"
        product = ((scale & 0x3FF) | (0x400 if scale >> 10 else 0)) * mantissa
        cut = max(product.bit_length() - 17, 0)
        halfway += cut > 0 and product & ((1 << cut) - 1) == 1 << (cut - 1)
        carried += cut > 0 and wanted.mantissa == 1 << 16 and product >> cut == (1 << 17) - 1
        await RisingEdge(dut.clk_i)
    assert halfway >= 200
    assert carried > 0
