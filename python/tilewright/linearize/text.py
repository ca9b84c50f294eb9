# SPDX-License-Identifier: Apache-2.0
"""Batches of real text: what a conversion is trained on and what it is measured on never share a file."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tilewright import data
from tilewright.evaluate import token_batches, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTATION = "documentation"
"""Name of the text that :func:`documentation` gives, beside those of :data:`tilewright.data.CORPORA`."""
SOURCES = (*data.CORPORA, DOCUMENTATION)
_SUFFIXES = {".md", ".rst", ".txt"}
_HELD_OUT = 5
_MIN_BYTES, _MAX_BYTES = 2_000, 400_000


def documentation_files(part: str) -> list[Path]:
    """Documentation files of the installed packages, sorted by name: README, guides, licences.

    part: "evaluation" takes one file in five, chosen by a checksum of its name, "calibration" the others.

    Raises:
        ValueError: ``part`` is neither.
    """
    if part not in data.PARTS:
        raise ValueError(f"part={part!r} is not known; choose one of {', '.join(data.PARTS)}")
    found = {}
    for package in distributions():
        for file in package.files or ():
            name = str(file)
            if file.suffix not in _SUFFIXES and file.name != "METADATA":
                continue
            held_out = zlib.crc32(name.encode()) % _HELD_OUT == 0
            if held_out == (part == "evaluation"):
                found[name] = Path(str(package.locate_file(file)))
    return [found[name] for name in sorted(found)]


def documentation(part: str, *, max_characters: int = 4_000_000) -> str:
    """Text of :func:`documentation_files`, UTF-8 files of 2 to 400 kB, identical ones once.

    Raises:
        FileNotFoundError: no installed package brings documentation.
    """
    seen: set[int] = set()
    pieces: list[str] = []
    size = 0
    for path in documentation_files(part):
        if size >= max_characters or not path.is_file() or not _MIN_BYTES <= path.stat().st_size <= _MAX_BYTES:
            continue
        raw = path.read_bytes()
        if zlib.crc32(raw) in seen:
            continue
        seen.add(zlib.crc32(raw))
        try:
            pieces.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            continue
        size += len(pieces[-1])
    if not pieces:
        raise FileNotFoundError(f"no installed package brings documentation; use {', '.join(data.CORPORA)}")
    return "\n\n".join(pieces)[:max_characters]


def source_text(source: str, part: str) -> str:
    """Text called ``source`` (:data:`SOURCES`) or of the UTF-8 file of that name.

    Raises:
        ValueError: the file is not UTF-8. FileNotFoundError: there is no such text.
    """
    if source == DOCUMENTATION:
        return documentation(part)
    if source in data.CORPORA:
        return data.corpus(source, part)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no such file, and none of the texts {', '.join(SOURCES)}")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as wrong:
        raise ValueError(f"{path} is not valid UTF-8 (byte {wrong.start}); convert it to UTF-8") from wrong


def text_tokens(
    tokenizer: PreTrainedTokenizerBase, sources: str | Sequence[str], part: str, *, max_tokens: int | None = None
) -> Tensor:
    """Tokens int64 [T] of one or several texts after one another; ``max_tokens`` of each at most."""
    names = [sources] if isinstance(sources, str) else list(sources)
    return torch.cat([tokenize(tokenizer, source_text(name, part), max_tokens=max_tokens) for name in names])


def training_batches(tokens: Tensor, *, length: int, batch: int = 1, seed: int = 0) -> Iterator[Tensor]:
    """Endless batches int64 [batch, length]: the text's consecutive pieces, in a new random order each time through.

    Raises:
        ValueError: the text has fewer than ``batch`` pieces (when the first batch is asked for).
    """
    pieces = torch.cat(token_batches(tokens, length=length))
    if len(pieces) < batch:
        raise ValueError(f"{len(tokens)} tokens give {len(pieces)} pieces of {length}; {batch} are needed for a batch")
    order: list[int] = []
    generator = random.Random(seed)
    while True:
        if len(order) < batch:
            order = list(range(len(pieces)))
            generator.shuffle(order)
        taken, order = order[:batch], order[batch:]
        yield pieces[taken]
