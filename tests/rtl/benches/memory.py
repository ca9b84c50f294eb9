# SPDX-License-Identifier: Apache-2.0
"""Memory behind the AXI ports: known contents, pauses on every channel, latency, error responses."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import cocotb
from cocotb.triggers import RisingEdge
from cocotbext.axi import AxiReadBus, AxiSlaveRead, AxiSlaveWrite, AxiWriteBus
from streams import SEED, pauses


def contents(address: int, length: int) -> bytes:
    """What memory holds before anything is written: every eight bytes depend on their address."""
    first, last = address // 8, -(-(address + length) // 8)
    words = b"".join(
        (((word + 1) * 0x9E3779B97F4A7C15 ^ word << 32) & (1 << 64) - 1).to_bytes(8, "little")
        for word in range(first, last)
    )
    return words[address % 8 :][:length]


class Memory:
    """What the slaves ask: ``bad`` addresses raise, which they answer with SLVERR, and zeros when read."""

    def __init__(self, bad: range = range(0)) -> None:
        self.written: dict[int, int] = {}
        self.bad = bad

    def _check(self, address: int, length: int) -> None:
        if range(max(address, self.bad.start), min(address + length, self.bad.stop)):
            raise IndexError(f"address {address:#x} answers with an error")

    async def read(self, address: int, length: int) -> bytes:
        self._check(address, length)
        return contents(address, length)

    async def write(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        self.written.update(zip(range(address, address + len(data)), data, strict=True))

    def expected(self, address: int, length: int) -> bytes:
        """What a read of one beat gives."""
        try:
            self._check(address, length)
        except IndexError:
            return bytes(length)
        return contents(address, length)


def _quiet(dut: Any) -> None:
    logging.getLogger(f"cocotb.{dut._name}").setLevel(logging.ERROR)


class ReadPort(AxiSlaveRead):
    """A read port that answers a burst ``latency`` cycles after it was asked for, bursts overlapping; it keeps them."""

    def __init__(
        self, dut: Any, prefix: str, memory: Memory, pattern: str = "always", latency: int = 0, seed: int = SEED
    ) -> None:
        _quiet(dut)
        self.bursts: list[tuple[int, int]] = []  # address, beats
        self._due: deque[int] = deque()
        self._cycle, self._latency = 0, latency
        super().__init__(AxiReadBus.from_prefix(dut, prefix), dut.clk_i, dut.rst_i, memory)
        self.ar_channel.queue_occupancy_limit = -1
        self._receive, self.ar_channel.recv = self.ar_channel.recv, self._recv_when_due
        cocotb.start_soon(self._watch())
        for place, channel in enumerate((self.ar_channel, self.r_channel)):
            if pattern != "always":
                channel.set_pause_generator(not go for go in pauses(pattern, 10 * seed + place))

    async def _recv_when_due(self) -> Any:
        request = await self._receive()
        due = self._due.popleft()
        while self._cycle < due:
            await RisingEdge(self.clock)
        return request

    async def _watch(self) -> None:
        ar = self.bus.ar
        while True:
            await RisingEdge(self.clock)
            self._cycle += 1
            if self.reset.value:
                self._due.clear()
            elif ar.arvalid.value and ar.arready.value:
                assert int(ar.arburst.value) == 1
                assert 8 << int(ar.arsize.value) == self.width
                self.bursts.append((int(ar.araddr.value), int(ar.arlen.value) + 1))
                self._due.append(self._cycle + self._latency)


class WritePort(AxiSlaveWrite):
    """A write port; it keeps the bursts."""

    def __init__(self, dut: Any, prefix: str, memory: Memory, pattern: str = "always", seed: int = SEED) -> None:
        _quiet(dut)
        self.bursts: list[tuple[int, int]] = []  # address, beats
        super().__init__(AxiWriteBus.from_prefix(dut, prefix), dut.clk_i, dut.rst_i, memory)
        cocotb.start_soon(self._watch())
        for place, channel in enumerate((self.aw_channel, self.w_channel, self.b_channel)):
            if pattern != "always":
                channel.set_pause_generator(not go for go in pauses(pattern, 10 * seed + place))

    async def _watch(self) -> None:
        aw = self.bus.aw
        while True:
            await RisingEdge(self.clock)
            if not self.reset.value and aw.awvalid.value and aw.awready.value:
                assert int(aw.awburst.value) == 1
                assert 8 << int(aw.awsize.value) == self.width
                self.bursts.append((int(aw.awaddr.value), int(aw.awlen.value) + 1))


def check_bursts(bursts: list[tuple[int, int]], beat_bytes: int, burst_beats: int = 16) -> None:
    """Each within an aligned window of burst_beats, so within 4 KiB too."""
    assert burst_beats * beat_bytes <= 4096
    for address, beats in bursts:
        first = address // beat_bytes
        assert address % beat_bytes == 0
        assert first // burst_beats == (first + beats - 1) // burst_beats
