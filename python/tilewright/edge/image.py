# SPDX-License-Identifier: Apache-2.0
"""A model compiled for the accelerator: one file of weight streams, descriptors, tables and a memory map.

A 4096-byte head (magic, version, length of the manifest, CRC-32 of everything behind the head), the manifest in JSON,
then sections, each from a multiple of 4096 bytes on: ``weights`` (streams of beats), ``program`` (descriptors),
``final_norm``, ``embedding``, ``head`` (float16). The manifest's ``sections`` is the memory map.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright._files import atomic_write
from tilewright.edge.contract import FUSE_MODES, Factor, Layer, Linear, Tiling, beats_of, weights_of
from tilewright.edge.contract.stream import BEAT_BITS
from tilewright.edge.model import EdgeModel
from tilewright.edge.program import MATRICES, NORM, Descriptor, Op, decode, encode, layer_program

MAGIC, VERSION, PAGE = b"TWEDGE\0\0", 2, 4096
_HEAD = struct.Struct("<8sIII")


@dataclass(frozen=True)
class Image:
    """A compiled model: its manifest, its program and the model itself, read back from the streams."""

    manifest: dict[str, Any]
    program: list[Descriptor]
    model: EdgeModel


def sections_of(model: EdgeModel) -> tuple[dict[str, NDArray[Any]], list[Descriptor]]:
    """What an image holds by name, ``weights`` (uint8 `[bytes]`) first, and the program decoded.

    Raises:
        ValueError: the weights do not fit 32-bit addresses.
    """
    streams, program, at = [], [], 0
    for index, layer in enumerate(model.layers):
        places = {}
        for name in MATRICES:
            linear: Linear = getattr(layer, name)
            beats = beats_of(linear.weights, linear.norm)
            places[name] = (at, len(beats))
            at += beats.size
            streams.append(beats.reshape(-1))
        program += layer_program(layer, index, places)
    if at >= 1 << 32:
        raise ValueError(f"compile: {at} bytes of weights, an address has 32 bits")
    return {
        "weights": np.concatenate(streams),
        "program": encode(program),
        "final_norm": model.final_norm,
        "embedding": model.embedding,
        "head": model.head,
    }, program


def compile_image(model: EdgeModel, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a model's image; returns its manifest.

    Raises:
        ValueError: the weights do not fit 32-bit addresses.
    """
    sections, _ = sections_of(model)
    if model.head.shape == model.embedding.shape and np.array_equal(model.head, model.embedding):
        del sections["head"]
    t = model.tiling
    manifest: dict[str, Any] = {
        "tiling": {"g": t.g, "t": t.t, "q": t.q, "p": t.p, "lanes": t.lanes},
        "beat_bits": BEAT_BITS,
        "layers": len(model.layers),
        "width": int(model.embedding.shape[1]),
        "vocab": int(model.embedding.shape[0]),
        "eps": model.eps,
        "rope_base": model.rope_base,
        "sections": {},
    }
    # The map is relative to the first section, so that its own length does not move it.
    at = 0
    for name, data in sections.items():
        manifest["sections"][name] = {"offset": at, "bytes": data.nbytes, "shape": list(data.shape)}
        at += -(-data.nbytes // PAGE) * PAGE
    text = json.dumps(manifest).encode()
    parts = [_padded(text)] + [_padded(np.ascontiguousarray(data).tobytes()) for data in sections.values()]
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    with atomic_write(path) as partial, Path(partial).open("wb") as file:
        file.write(_HEAD.pack(MAGIC, VERSION, len(text), crc).ljust(PAGE, b"\0"))
        for part in parts:
            file.write(part)
    return manifest


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % PAGE)


def read_image(path: str | os.PathLike[str]) -> Image:
    """Read an image back.

    Raises:
        ValueError: it is no image, of another version, cut off or changed.
    """
    data = Path(path).read_bytes()
    if len(data) < PAGE or data[:8] != MAGIC:
        raise ValueError(f"{path}: not an image of `tw edge compile`")
    _, version, length, crc = _HEAD.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"{path}: version {version}, this reads {VERSION}; compile the model again")
    if zlib.crc32(data[PAGE:]) != crc:
        raise ValueError(f"{path}: the checksum does not fit: the file is cut off or changed; compile the model again")
    manifest = json.loads(data[PAGE : PAGE + length])
    base = PAGE + -(-length // PAGE) * PAGE

    def section(name: str, dtype: Any) -> NDArray[Any]:
        place = manifest["sections"][name]
        return np.frombuffer(data, np.uint8, place["bytes"], base + place["offset"]).view(dtype).reshape(place["shape"])

    tiling = Tiling(**manifest["tiling"])
    program = decode(section("program", np.int32))
    weights = section("weights", np.uint8)
    layers = [_layer(part, weights, tiling, manifest["beat_bits"], manifest["eps"]) for part in _by_layer(program)]
    embedding = section("embedding", np.float16)
    head = section("head", np.float16) if "head" in manifest["sections"] else embedding
    model = EdgeModel(
        layers, embedding, head, section("final_norm", np.float16), manifest["eps"], manifest["rope_base"], tiling
    )
    return Image(manifest, program, model)


def _by_layer(program: list[Descriptor]) -> Iterator[list[Descriptor]]:
    part: list[Descriptor] = []
    for one in program:
        part.append(one)
        if one.op == Op.END:
            yield part
            part = []


def _layer(part: list[Descriptor], weights: NDArray[np.uint8], tiling: Tiling, beat_bits: int, eps: float) -> Layer:
    linears, size = {}, beat_bits // 8
    matrices = [one for one in part if one.op == Op.LINEAR]
    for name, one in zip(MATRICES, matrices, strict=True):
        beats = weights[one.address : one.address + one.beats * size].reshape(-1, size)
        norms = one.inputs if one.flags & NORM else 0
        matrix, norm = weights_of(beats, one.outputs, one.inputs, tiling, norms)
        linears[name] = Linear(matrix, Factor(one.mantissa, one.exponent), norm if norms else None)
    heads, kv_heads, head_size = matrices[0].heads
    return Layer(
        **linears, heads=heads, kv_heads=kv_heads, head_size=head_size, eps=eps, gate_map=FUSE_MODES[matrices[5].mode]
    )
