# SPDX-License-Identifier: Apache-2.0
"""Descriptors: what the accelerator is told to do for a layer, 64 bytes each."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract import FUSE_MODES, Layer, Linear, NormConstants
from tilewright.edge.contract.softmax import score_factor

BYTES = 64


class Op(IntEnum):
    """Opcodes."""

    LINEAR = 1
    """Load a matrix; with ENTER norm and quantize ``source`` first; multiply the quantized row; fuse; to ``target``."""
    ATTEND = 2
    """Attention of ``source`` over the layer's cache, to ``target``."""
    END = 3
    """The layer is done."""


class Buffer(IntEnum):
    """Where rows are: the residual stream, scratch, or the layer's cache."""

    NONE = 0
    STREAM = 1
    QUERY = 2
    MIXED = 3
    GATE = 4
    GATED = 5
    KEYS = 6
    VALUES = 7


ENTER, NORM = 1, 2


@dataclass(frozen=True)
class Descriptor:
    """Sixteen 32-bit words, in the order of the fields.

    Attributes:
        flags: ENTER, NORM. mode: number of a fuse mode. address: of the weight stream, bytes from the image's weights.
        beats: of the weight stream. mantissa, exponent: gamma / 127; of ATTEND the score factor. eps_low, eps_high:
        halves of EPS. geometry: heads + 256 * key heads + 65536 * head size.
    """

    op: int
    flags: int = 0
    mode: int = 0
    source: int = 0
    target: int = 0
    side: int = 0
    inputs: int = 0
    outputs: int = 0
    address: int = 0
    beats: int = 0
    mantissa: int = 0
    exponent: int = 0
    eps_low: int = 0
    eps_high: int = 0
    geometry: int = 0
    layer: int = 0

    @property
    def eps(self) -> int:
        return self.eps_low | self.eps_high << 32

    @property
    def heads(self) -> tuple[int, int, int]:
        """(heads, key heads, head size)."""
        return self.geometry & 255, self.geometry >> 8 & 255, self.geometry >> 16


def encode(program: list[Descriptor]) -> NDArray[np.int32]:
    """int32 `[descriptors, 16]`."""
    return np.array([astuple(one) for one in program], np.int64).astype(np.uint32).view(np.int32).reshape(-1, 16)


def decode(words: NDArray[np.int32]) -> list[Descriptor]:
    """The inverse of :func:`encode`.

    Raises:
        ValueError: an opcode or a fuse mode that does not exist.
    """
    found = []
    for index, row in enumerate(words.view(np.uint32).tolist()):
        named = dict(zip((f.name for f in fields(Descriptor)), row, strict=True))
        named["exponent"] -= (named["exponent"] >> 31) << 32
        if named["op"] not in set(Op) or named["mode"] >= len(FUSE_MODES):
            raise ValueError(
                f"descriptor {index}: op = {named['op']}, mode = {named['mode']}; the image is not a program"
            )
        found.append(Descriptor(**named))
    return found


# matrix, source it enters from (None: what is quantized already), target, fuse mode, side
_STEPS: tuple[tuple[str, Buffer | None, Buffer, str, Buffer], ...] = (
    ("q", Buffer.STREAM, Buffer.QUERY, "rope", Buffer.NONE),
    ("k", None, Buffer.KEYS, "rope", Buffer.NONE),
    ("v", None, Buffer.VALUES, "bypass", Buffer.NONE),
    ("o", Buffer.MIXED, Buffer.STREAM, "residual", Buffer.STREAM),
    ("gate", Buffer.STREAM, Buffer.GATE, "bypass", Buffer.NONE),
    ("up", None, Buffer.GATED, "gate_map", Buffer.GATE),
    ("down", Buffer.GATED, Buffer.STREAM, "residual", Buffer.STREAM),
)
MATRICES = tuple(step[0] for step in _STEPS)


def layer_program(layer: Layer, index: int, places: dict[str, tuple[int, int]]) -> list[Descriptor]:
    """The descriptors of a layer; ``places`` has (address, beats) of each matrix's stream."""
    geometry = layer.heads | layer.kv_heads << 8 | layer.head_size << 16
    program = []
    for name, source, target, mode, side in _STEPS:
        if name == "o":
            factor = score_factor(layer.head_size)
            program.append(
                Descriptor(
                    Op.ATTEND,
                    source=Buffer.QUERY,
                    target=Buffer.MIXED,
                    mantissa=factor.mantissa,
                    exponent=factor.exponent,
                    geometry=geometry,
                    layer=index,
                )
            )
        linear: Linear = getattr(layer, name)
        norm = linear.norm is not None
        eps = NormConstants.of(linear.weights.inputs, layer.eps).eps if norm else 0
        program.append(
            Descriptor(
                Op.LINEAR,
                (ENTER if source is not None else 0) | (NORM if norm else 0),
                FUSE_MODES.index(layer.gate_map if mode == "gate_map" else mode),
                source or Buffer.NONE,
                target,
                side,
                linear.weights.inputs,
                linear.weights.outputs,
                *places[name],
                linear.scale.mantissa,
                linear.scale.exponent,
                eps & 0xFFFFFFFF,
                eps >> 32,
                geometry,
                index,
            )
        )
    return [*program, Descriptor(Op.END, layer=index)]
