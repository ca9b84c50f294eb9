# SPDX-License-Identifier: Apache-2.0
"""Activations on disk: written batch by batch, reopened as memory-mapped tensors.

A store is a folder: ``index.json`` (names, shapes, dtypes, number of rows) and one file of raw rows per point. Where
the batches have token dimensions, ``tokens.bin`` says which token each row belongs to.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from tilewright._files import atomic_directory
from tilewright._progress import track
from tilewright.capture.sites import Site, nearest
from tilewright.capture.stream import NO_BATCHES, Batch, TokenShape, distinct_points, rows_of_batch

INDEX = "index.json"
TOKENS = "tokens.bin"
FORMAT = "tilewright activations 1"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}


class ActivationStore:
    """Recorded activations, opened from their folder; rows are read from the disk when they are used.

    ``store[name]`` is a tensor [n, ...C] mapped into memory: writing into it does not reach the file. ``tokens`` is
    int64 [n, 3] (sequence, position, token id or -1) or None.

    Raises:
        FileNotFoundError: the folder holds no store.
        ValueError: it is damaged, incomplete, or of another byte order; the message says which file.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        path = self.directory / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{self.directory} holds no activation store ({INDEX} is missing)")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != FORMAT or index["byte_order"] != sys.byteorder:
                raise ValueError(f"format {index['format']!r}, {index['byte_order']}-endian, is not read here")
            self._points = {entry["name"]: _Entry(self.directory, entry) for entry in index["points"]}
            self.tokens = _map(self.directory / TOKENS, (index["tokens"], 3), torch.int64) if index["tokens"] else None
        except (KeyError, TypeError, ValueError) as wrong:
            raise ValueError(f"{path}: not a readable activation store ({wrong})") from wrong

    @property
    def names(self) -> list[str]:
        """Names of the recorded points, in the order of recording."""
        return list(self._points)

    def __contains__(self, name: object) -> bool:
        return name in self._points

    def __getitem__(self, name: str) -> Tensor:
        """Rows [n, ...C] of one point; an unknown name is a ValueError that lists near names."""
        if name not in self._points:
            near = nearest(name, self.names) or self.names[:8]
            raise ValueError(f"{name!r} was not recorded in {self.directory}; near names: {', '.join(near)}")
        return self._points[name].rows()

    def __len__(self) -> int:
        """Rows of each point (of the first where they differ)."""
        return next(iter(self._points.values())).shape[0]

    def batches(self, name: str, size: int, *, seed: int | None = None) -> Iterator[Tensor]:
        """Rows of one point in pieces of ``size`` (the last may be smaller): in order, or shuffled by ``seed``.

        Raises:
            ValueError: the name is unknown or size is below 1.
        """
        if size < 1:
            raise ValueError(f"size={size}: at least 1 is needed")
        rows = self[name]
        if seed is None:
            yield from rows.split(size)
            return
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        for some in order.split(size):
            yield rows[some]


class _Entry:
    """One point of an index: where its rows lie and what they are."""

    def __init__(self, directory: Path, raw: dict[str, Any]) -> None:
        self.path = directory / Path(raw["file"]).name
        self.shape = tuple(int(size) for size in raw["shape"])
        self.dtype = _DTYPES[raw["dtype"]]
        self.rows()

    def rows(self) -> Tensor:
        return _map(self.path, self.shape, self.dtype)


def _map(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A file of raw values as a tensor, read when touched; changes stay in memory."""
    count = math.prod(shape)
    have = path.stat().st_size if path.is_file() else -1
    if have != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {max(have, 0)} bytes, {count * dtype.itemsize} are needed for {list(shape)}")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)


def record(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Sequence[str | Site],
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> ActivationStore:
    """Run the model over batches and write every row of the named activations to a folder, in constant memory.

    Batches, padding and names are those of :func:`tilewright.capture.observe`. The folder appears complete or not at
    all.

    dtype: of the file, float64, float32, bfloat16 or float16; the activation's own when None. overwrite: take the place
    of a store that is there.

    Raises:
        FileExistsError: the folder exists, and overwrite is False or it is no activation store.
        ValueError: a site matches nothing, batches are empty, dtype is another, or an activation is NaN or infinite
            (in the file's dtype); nothing is left on the disk.
    """
    target = Path(directory)
    if target.exists() and not (overwrite and (target / INDEX).is_file()):
        way = f"it is no activation store ({INDEX} is missing)" if overwrite else "overwrite=True takes its place"
        raise FileExistsError(f"{target} exists; {way}")
    if dtype is not None and dtype not in _FLOATS:
        raise ValueError(f"dtype={dtype}; need one of {', '.join(_DTYPES)}, or None")
    names = distinct_points(model, sites)
    with atomic_directory(target) as folder:
        _write(model, batches, sites, names, folder, dtype, progress)
    return ActivationStore(target)


def _write(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Sequence[str | Site],
    names: list[str],
    folder: Path,
    dtype: torch.dtype | None,
    progress: bool | None,
) -> None:
    shape = TokenShape()
    sequences = tokens = count = 0
    known = True
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"{i:05d}.bin").open("wb")) for i in range(len(names))]
        writers = {name: _Writer(name, file) for name, file in zip(names, files, strict=True)}
        token_file = stack.enter_context((folder / TOKENS).open("wb"))
        for batch in track(batches, "recording", show=progress):
            count += 1
            shape.take(batch)
            for name, rows in rows_of_batch(model, batch, sites, shape, names).items():
                writers[name].write(rows, dtype)
            table = shape.table(sequences)
            known &= table is not None
            if table is not None and known and shape.tokens is not None:
                token_file.write(_bytes(table))
                sequences, tokens = sequences + shape.tokens[0], tokens + len(table)
    if count == 0:
        raise ValueError(NO_BATCHES)
    for name, writer in writers.items():
        if writer.count == 0:
            raise ValueError(f"{name} has no activation to record; every token was masked")
    if not known:
        tokens = 0
        (folder / TOKENS).unlink()
    points = [writer.entry(f"{i:05d}.bin") for i, writer in enumerate(writers.values())]
    index = {"format": FORMAT, "byte_order": sys.byteorder, "tokens": tokens, "points": points}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


class _Writer:
    """Appends the rows of one point to its file."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name, self.file = name, file
        self.count = 0
        self.row: tuple[int, ...] | None = None
        self.dtype = torch.float32

    def write(self, rows: Tensor, dtype: torch.dtype | None) -> None:
        if not rows.is_floating_point():
            raise ValueError(f"{self.name} has dtype {rows.dtype}; only floating activations can be recorded")
        rows = rows.to("cpu", dtype or rows.dtype)
        row = tuple(rows.shape[1:])
        if self.row is not None and (row, rows.dtype) != (self.row, self.dtype):
            raise ValueError(
                f"{self.name}: rows of {list(row)} {rows.dtype} after rows of {list(self.row)} {self.dtype}; "
                "give the site a transform that makes them equal"
            )
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"{self.name}: activations hold NaN or infinite values in {rows.dtype}")
        self.row, self.dtype = row, rows.dtype
        self.file.write(_bytes(rows))
        self.count += len(rows)

    def entry(self, file: str) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, "file": file, "shape": [self.count, *(self.row or ())], "dtype": dtype}


def _bytes(rows: Tensor) -> bytes:
    return rows.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
