# SPDX-License-Identifier: Apache-2.0
"""Real text as bytes: the shipped corpora and the documentation of installed packages, in windows for training."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tilewright.data.recall import Batch, mix
from tilewright.data.text import CORPORA, PARTS, corpus

VOCABULARY = 256
DOCUMENTATION = "documentation"
DOCUMENTED_PACKAGES = ("numpy", "torch")
# One file in this many is held out.
_HELD_OUT = 8
_SHORTEST = 200


def byte_text(name: str, part: str, *, max_bytes: int | None = None) -> Tensor:
    """A text as bytes, uint8 [N]: one of ``tilewright.data.CORPORA``, or "documentation" (:func:`documentation`).

    part: "calibration" for training, "evaluation" for held-out text. max_bytes: only the beginning.
    Errors are those of ``tilewright.data.corpus``.
    """
    if name != DOCUMENTATION and name not in CORPORA:
        raise ValueError(f"name={name!r} is not known; choose one of {', '.join((*CORPORA, DOCUMENTATION))}")
    text = documentation(part) if name == DOCUMENTATION else corpus(name, part)
    return to_bytes(text.encode()[:max_bytes])


def to_bytes(data: bytes | str) -> Tensor:
    """uint8 [N] of a byte string or of a text's UTF-8."""
    return torch.tensor(list(data.encode() if isinstance(data, str) else data), dtype=torch.uint8)


def documentation(part: str, *, packages: Sequence[str] = DOCUMENTED_PACKAGES, max_characters: int = 1_500_000) -> str:
    """Docstrings of installed packages, split by file into training and held-out text.

    Files are visited in the order of a hash of their names; one in eight, by the same hash, is held out ("evaluation"),
    the others are "calibration". A docstring (200 characters or more) that appeared before in either part is dropped,
    so the parts share none. Nothing is imported: sources are parsed.

    max_characters: of both parts together. The text depends on the installed versions.

    Raises `ValueError` for an unknown part, `FileNotFoundError` when no named package is installed.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r} is not known; choose one of {', '.join(PARTS)}")
    return _documentation(tuple(packages), max_characters)[PARTS.index(part)]


@dataclass(frozen=True)
class ByteWindows:
    """Random windows of a token text, numbered by step: ``windows(step)`` is (inputs, labels), int64 [B, T] each.

    text: integers [N] (bytes or token ids). ``labels[b, t]`` is the token after ``inputs[b, t]``. The windows are a
    function of (seed, step), so a resumed run sees what it would have seen.
    """

    text: Tensor
    batch: int
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.text.dim() != 1 or len(self.text) <= self.length or self.length < 1:
            raise ValueError(
                f"text of shape {list(self.text.shape)}: integers [N] with N > length={self.length} are needed"
            )

    def __call__(self, step: int) -> Batch:
        """The windows of one step."""
        random = torch.Generator().manual_seed(mix(self.seed, step))
        starts = torch.randint(0, len(self.text) - self.length, (self.batch, 1), generator=random)
        window = self.text[starts + torch.arange(self.length + 1)].long()
        return window[:, :-1], window[:, 1:]


def held_out_windows(text: Tensor, *, length: int, batch: int, count: int | None = None) -> list[Batch]:
    """Consecutive windows of a token text without overlap, for evaluation: batches of (inputs, labels).

    count: windows in all, the whole text when None; the last batch may be smaller.

    Raises `ValueError` when the text is shorter than ``count`` windows (or than one).
    """
    available = (len(text) - 1) // length
    if available < (count or 1):
        raise ValueError(f"{len(text)} tokens hold {max(available, 0)} windows of {length}; {count or 1} are needed")
    count = count or available
    inputs = text[: count * length].view(count, length).long()
    labels = text[1 : count * length + 1].view(count, length).long()
    return list(zip(inputs.split(batch), labels.split(batch), strict=True))


@lru_cache(maxsize=4)
def _documentation(packages: tuple[str, ...], max_characters: int) -> tuple[str, str]:
    parts: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    total = 0
    for digest, path in _sources(packages):
        held_out = digest[0] % _HELD_OUT == 0
        for text in _docstrings(path):
            if text in seen:
                continue
            seen.add(text)
            parts[held_out].append(text)
            total += len(text)
        if total >= max_characters:
            break
    return "\n\n".join(parts[0]) + "\n", "\n\n".join(parts[1]) + "\n"


def _sources(packages: tuple[str, ...]) -> list[tuple[bytes, Path]]:
    """Python files of the packages, each with the hash of its name, in the order of the hashes."""
    files = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            root = Path(folder)
            names = ((f"{package}/{path.relative_to(root).as_posix()}", path) for path in root.rglob("*.py"))
            files += [(hashlib.blake2b(name.encode(), digest_size=8).digest(), path) for name, path in names]
    if not files:
        raise FileNotFoundError(f"none of the packages {', '.join(packages)} is installed; name installed ones")
    return sorted(files)


def _docstrings(path: Path) -> Iterator[str]:
    """Cleaned docstrings of a source file, long ones only; none where it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                yield text
