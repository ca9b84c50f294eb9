# SPDX-License-Identifier: Apache-2.0
"""One entry for every kind of checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from tilewright.models.errors import CheckpointError
from tilewright.models.language_model import LanguageModel


def load(path: str | os.PathLike[str]) -> LanguageModel:
    """Load a Llama-family model.

    Args:
        path: a GGUF file; a transformers directory (float, GPTQ, AWQ, compressed-tensors); a safetensors
            file whose ``config.json`` lies beside it; or a directory written by :func:`tilewright.models.save`.

    Raises:
        CheckpointError: nothing there, damaged, incomplete, or of an unsupported architecture or format.
    """
    place = Path(path)
    if not place.exists():
        raise CheckpointError(
            f"{place}: no such file or directory; a GGUF file, a safetensors file or a model directory is needed"
        )
    if place.is_dir():
        return _load_directory(place)
    if place.suffix == ".gguf" or _starts_with(place, b"GGUF"):
        from tilewright.models.gguf_import import load_gguf

        return load_gguf(place)
    if place.suffix == ".safetensors":
        return _load_directory(place.parent, place.name)
    raise CheckpointError(f"{place.name}: is neither a GGUF nor a safetensors file")


def _load_directory(place: Path, file: str | None = None) -> LanguageModel:
    from tilewright.models.checkpoint import is_checkpoint, load_checkpoint
    from tilewright.models.safetensors_import import load_transformers

    if (place / "linearized.json").is_file():
        raise CheckpointError(f"{place.name}: is a linearized model; load it with tilewright.linearize.load(directory)")
    if file in (None, "model.safetensors") and is_checkpoint(place):
        return load_checkpoint(place)
    return load_transformers(place, file)


def _starts_with(place: Path, magic: bytes) -> bool:
    try:
        with place.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as wrong:
        raise CheckpointError(f"{place.name}: cannot be read: {wrong.strerror or wrong}") from wrong
