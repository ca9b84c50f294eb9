# SPDX-License-Identifier: Apache-2.0
"""The GGUF container, read strictly: every count, length, offset and type is checked before it is used.

Block sizes and value types are the ``gguf`` package's; its reader is not used, since it trusts the
header (a flipped length maps or allocates what it says) and builds every string through numpy.
Layout: ggml-org/ggml docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.models.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _BOOL = 8, 9, 7
_U64 = struct.Struct("<Q")
_MAX_DIMS = 4
# bitnet.cpp's own type, whose number no longer means anything else: 2 bits a value, and 32 bytes at the end of the
# tensor that begin with its float32 scale.
I2_S, I2_S_TYPE, I2_S_COLUMNS, I2_S_TAIL = "I2_S", 36, 128, 32
_MAX_ELEMENTS = 1 << 48


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies. ``shape`` is row-major (torch's order), ``offset`` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensor directory of a GGUF file whose every tensor lies inside the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorRecord]

    def read(self, record: TensorRecord) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tensor's bytes: uint8 [product of all dims but the last, bytes of a row]."""
        return self.read_flat(record).reshape(math.prod(record.shape[:-1]), -1)

    def read_flat(self, record: TensorRecord) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tensor's bytes: uint8 [bytes]."""
        data = np.fromfile(self.path, dtype=np.uint8, count=record.nbytes, offset=record.offset)
        if data.size != record.nbytes:
            raise CheckpointError(
                f"{self.path.name}: tensor {record.name!r} ends after {data.size} of {record.nbytes} bytes"
            )
        return data


@dataclass(frozen=True)
class StringArray:
    """An array of strings, checked to be UTF-8 and kept as the file's bytes: a vocabulary as Python strings would
    stay resident at many times its size."""

    raw: bytes
    count: int

    def __len__(self) -> int:
        return self.count

    def tolist(self) -> list[str]:
        """The strings."""
        return list(_Cursor(self.raw, "string array").strings(self.count, "string"))


class _Cursor:
    """Bounds-checked reading position over the mapped file."""

    def __init__(self, buffer: mmap.mmap | bytes, name: str) -> None:
        self.buffer, self.name, self.size, self.at = buffer, name, len(buffer), 0

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise CheckpointError(
                f"{self.name}: {what} needs {count} bytes at offset {self.at}, the file ends after "
                f"{self.size - self.at}; "
                "it is truncated or damaged, fetch it again"
            )

    def scalar(self, type_id: int, what: str) -> Any:
        form = struct.Struct("<" + _SCALARS[type_id])
        self.need(form.size, what)
        if type_id == _BOOL and self.buffer[self.at] > 1:
            raise CheckpointError(
                f"{self.name}: {what} is a boolean with value {self.buffer[self.at]}, 0 or 1 is needed"
            )
        (value,) = form.unpack_from(self.buffer, self.at)
        self.at += form.size
        return value

    def strings(self, count: int, what: str) -> Iterator[str]:
        self.need(8 * count, f"{what} ({count} strings)")
        buffer, size, at = self.buffer, self.size, self.at
        for _ in range(count):
            end = at + 8
            if end <= size:
                end += _U64.unpack_from(buffer, at)[0]
            if end > size:
                self.at = at
                self.need(end - at, what)
            try:
                text = buffer[at + 8 : end].decode("utf-8")
            except UnicodeDecodeError as wrong:
                raise CheckpointError(
                    f"{self.name}: {what} holds a string at offset {at} that is not UTF-8 ({wrong.reason})"
                ) from None
            self.at = at = end
            yield text

    def string(self, what: str) -> str:
        return next(self.strings(1, what))

    def string_array(self, count: int, what: str) -> StringArray:
        start = self.at
        for _ in self.strings(count, what):
            pass
        return StringArray(self.buffer[start : self.at], count)

    def array(self, what: str) -> StringArray | np.ndarray[Any, Any]:
        type_id, count = self.scalar(4, what), self.scalar(10, what)
        if type_id == _STRING:
            return self.string_array(count, what)
        if type_id not in _SCALARS:
            raise CheckpointError(
                f"{self.name}: {what} is an array of type {type_id}; strings and plain numbers are supported"
            )
        dtype = np.dtype(_SCALARS[type_id].replace("?", "u1")).newbyteorder("<")
        self.need(dtype.itemsize * count, f"{what} ({count} numbers)")
        start, self.at = self.at, self.at + dtype.itemsize * count
        return np.frombuffer(self.buffer[start : self.at], dtype=dtype)


def read_header(path: Path) -> GGUFHeader:
    """Parse and validate the header of a GGUF file.

    Raises:
        CheckpointError: not a GGUF file, an unsupported version, or any inconsistency.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise CheckpointError(
                    f"{path.name}: {os.fstat(file.fileno()).st_size} bytes are too few for a GGUF file"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _parse(path, _Cursor(buffer, path.name))
    except OSError as wrong:
        raise CheckpointError(f"{path.name}: cannot be read: {wrong.strerror or wrong}") from wrong


def _parse(path: Path, cursor: _Cursor) -> GGUFHeader:
    magic = cursor.buffer[:4]
    if magic != b"GGUF":
        raise CheckpointError(f"{path.name}: a GGUF file starts with b'GGUF', this one with {magic!r}")
    cursor.at = 4
    version = cursor.scalar(4, "version")
    if version not in (2, 3):
        hint = " (a big-endian file: convert it with the gguf package)" if version in (2 << 24, 3 << 24) else ""
        raise CheckpointError(f"{path.name}: GGUF version {version} is not supported, 2 and 3 are{hint}")
    tensor_count, key_count = cursor.scalar(10, "tensor count"), cursor.scalar(10, "key count")
    # 13 bytes: the shortest key (length, no name, type, one byte); 32: the shortest tensor record
    cursor.need(13 * key_count + 32 * tensor_count, f"a directory of {key_count} keys and {tensor_count} tensors")
    metadata = _parse_metadata(cursor, key_count)
    tensors = _parse_directory(cursor, tensor_count, _alignment(metadata, path.name))
    return GGUFHeader(path, metadata, tensors)


def _parse_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"name of key {index}")
        if not key or len(key) > 65535 or not key.isascii() or not key.isprintable():
            raise CheckpointError(f"{cursor.name}: key {index} has the name {key[:60]!r}; printable ASCII is needed")
        if key in metadata:
            raise CheckpointError(f"{cursor.name}: key {key!r} occurs twice")
        type_id = cursor.scalar(4, f"type of key {key!r}")
        if type_id == _STRING:
            metadata[key] = cursor.string(f"key {key!r}")
        elif type_id == _ARRAY:
            metadata[key] = cursor.array(f"key {key!r}")
        elif type_id in _SCALARS:
            metadata[key] = cursor.scalar(type_id, f"key {key!r}")
        else:
            raise CheckpointError(f"{cursor.name}: key {key!r} has the unknown value type {type_id}")
    return metadata


def _alignment(metadata: dict[str, Any], name: str) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{name}: general.alignment={alignment!r} must be a power of two in 8..{1 << 20}")
    return alignment


def _parse_directory(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorRecord]:
    raw = [_parse_record(cursor, index) for index in range(count)]
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorRecord] = {}
    expected = 0
    for record in raw:
        where = f"{cursor.name}: tensor {record.name!r}"
        if record.name in tensors:
            raise CheckpointError(f"{where} occurs twice")
        # ggml writes tensors one after another; any other offset means overlap, a gap or a wrong type
        if record.offset != expected:
            raise CheckpointError(
                f"{where} starts at {record.offset}, its predecessors' types and shapes end at {expected}"
            )
        end = base + record.offset + record.nbytes
        if end > cursor.size:
            raise CheckpointError(
                f"{where} ({record.type_name} {list(record.shape)}) ends at byte {end}, the file at {cursor.size}; "
                "it is truncated or damaged, fetch it again"
            )
        expected = -(-(record.offset + record.nbytes) // alignment) * alignment
        tensors[record.name] = TensorRecord(
            record.name, record.shape, record.type_id, record.type_name, base + record.offset, record.nbytes
        )
    if cursor.size > base + expected:
        raise CheckpointError(
            f"{cursor.name}: {cursor.size - base - expected} bytes follow the last tensor; type or shape is wrong"
        )
    return tensors


def _parse_record(cursor: _Cursor, index: int) -> TensorRecord:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string(f"name of tensor {index}")
    where = f"{cursor.name}: tensor {name[:120]!r}"
    dims = cursor.scalar(4, f"rank of tensor {index}")
    if not 1 <= dims <= _MAX_DIMS:
        raise CheckpointError(f"{where} has {dims} dimensions, 1..{_MAX_DIMS} are needed")
    shape = tuple(cursor.scalar(10, f"shape of tensor {name[:120]!r}") for _ in range(dims))[::-1]
    if min(shape) < 1 or math.prod(shape) > _MAX_ELEMENTS:
        raise CheckpointError(
            f"{where} has shape {list(shape)}; every dimension must be 1 or more and the product below 2^48"
        )
    type_id, offset = cursor.scalar(4, f"type of tensor {index}"), cursor.scalar(10, f"offset of tensor {index}")
    if type_id == I2_S_TYPE:
        if len(shape) != 2 or shape[1] % I2_S_COLUMNS:
            raise CheckpointError(
                f"{where} has shape {list(shape)}, I2_S needs a matrix with rows of a multiple of {I2_S_COLUMNS}"
            )
        return TensorRecord(name, shape, type_id, I2_S, offset, math.prod(shape) // 4 + I2_S_TAIL)
    try:
        kind = GGMLQuantizationType(type_id)
    except ValueError:
        raise CheckpointError(f"{where} has the unknown ggml type {type_id}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise CheckpointError(f"{where} has rows of {shape[-1]} elements, {kind.name} needs a multiple of {block}")
    return TensorRecord(name, shape, type_id, kind.name, offset, math.prod(shape) // block * block_bytes)
