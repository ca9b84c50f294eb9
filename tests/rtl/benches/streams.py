# SPDX-License-Identifier: Apache-2.0
"""Sources, sinks and monitors of valid/ready streams, with back-pressure from a seed."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ReadOnly, RisingEdge

SEED = int(os.environ.get("TILEWRIGHT_RTL_SEED", "1"))
PATTERNS = os.environ.get("TILEWRIGHT_RTL_PATTERNS", "always often half seldom bursts").split()


def pauses(pattern: str, seed: int) -> Iterator[bool]:
    """Whether to take part in each cycle, for ever."""
    chance = {"always": 1.0, "often": 0.9, "half": 0.5, "seldom": 0.1}.get(pattern)
    if chance is None:
        yield from itertools.cycle((True, True, True, False))
    draw = random.Random(seed)
    while True:
        yield draw.random() < chance


def start_clock(dut: Any) -> None:
    """Of each test anew: cocotb ends what a test started."""
    Clock(dut.clk_i, 4, unit="ns").start()


async def reset(dut: Any, cycles: int = 2, *, running: bool = False) -> None:
    """Start the clock unless it runs, and hold reset for some cycles."""
    if not running:
        start_clock(dut)
    dut.rst_i.value = 1
    for _ in range(cycles):
        await RisingEdge(dut.clk_i)
    dut.rst_i.value = 0


class Source:
    """Drives beats into a stream; a beat is the value of the data signal, or a dict of signals without their ending."""

    def __init__(self, dut: Any, prefix: str, pattern: str = "always", seed: int = SEED) -> None:
        self.dut, self.prefix = dut, prefix
        self.go = pauses(pattern, seed)
        self.valid, self.ready = getattr(dut, f"{prefix}_valid_i"), getattr(dut, f"{prefix}_ready_o")
        self.valid.value = 0

    def _drive(self, beat: Any) -> None:
        for name, value in (beat if isinstance(beat, dict) else {"data": beat}).items():
            getattr(self.dut, f"{self.prefix}_{name}_i").value = value

    async def send(self, beats: Iterable[Any]) -> None:
        """Return when the last beat was taken. Once valid, a beat stays until it is."""
        for beat in beats:
            while not next(self.go):
                await RisingEdge(self.dut.clk_i)
            self._drive(beat)
            self.valid.value = 1
            while True:
                await ReadOnly()
                taken = bool(self.ready.value)
                await RisingEdge(self.dut.clk_i)
                if taken:
                    break
            self.valid.value = 0


class Sink:
    """Takes beats from a stream, and checks that an offered beat does not change before it is taken."""

    def __init__(self, dut: Any, prefix: str, fields: Iterable[str], pattern: str = "always", seed: int = SEED) -> None:
        self.dut = dut
        self.go = pauses(pattern, seed + 1)
        self.valid, self.ready = getattr(dut, f"{prefix}_valid_o"), getattr(dut, f"{prefix}_ready_i")
        self.fields = {name: getattr(dut, f"{prefix}_{name}_o") for name in fields}
        self.ready.value = 0

    async def take(self, count: int, most_cycles: int) -> list[dict[str, int]]:
        """The next beats; an error when they do not come in time."""
        beats: list[dict[str, int]] = []
        held: dict[str, int] | None = None
        for _ in range(most_cycles):
            ready = next(self.go)
            self.ready.value = int(ready)
            await ReadOnly()
            offered = {n: int(s.value) for n, s in self.fields.items()} if self.valid.value else None
            assert held is None or offered == held, f"a beat changed before it was taken: {held} became {offered}"
            held = offered if not ready else None
            if offered is not None and ready:
                beats.append(offered)
            await RisingEdge(self.dut.clk_i)
            if len(beats) == count:
                self.ready.value = 0
                return beats
        raise AssertionError(f"{len(beats)} of {count} beats came in {most_cycles} cycles")


class CycleCounter:
    """Rising edges of the clock since it was made."""

    def __init__(self, dut: Any) -> None:
        self.count = 0
        self._task = cocotb.start_soon(self._run(dut))

    async def _run(self, dut: Any) -> None:
        while True:
            await RisingEdge(dut.clk_i)
            self.count += 1
