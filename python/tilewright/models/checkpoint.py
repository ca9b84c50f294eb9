# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints: one safetensors file with a strict, versioned header, the tokenizer beside it.

``model.safetensors`` holds the parts of every weight; its metadata has one key, ``tilewright``, with a
JSON object of exactly these keys: format, version, config, weights (name to kind and, for low-bit
weights, their record), checksums (part to dtype, shape and CRC-32), settings, notes, source and crc32
(of all the other keys). A steered model is of version 2 and has one key more, maps: the strength of each
activation map, whose parts are ``maps.<place>.weight`` and ``.bias``. Anything else - an unknown or
missing key, a part too many or too few, another dtype or shape, a flipped bit - is an error that names it.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright._files import atomic_directory
from tilewright.capture.activation_map import ActivationMap
from tilewright.formats.int4 import Int4Weight
from tilewright.formats.int8 import Int8Weight
from tilewright.formats.ternary import PackedTernary
from tilewright.models.config import LlamaConfig
from tilewright.models.errors import CheckpointError
from tilewright.models.language_model import LanguageModel, Weight, check_maps, check_weights
from tilewright.models.safetensors_import import open_safetensors, read_tensor

FORMAT = "tilewright"
VERSION = 1
VERSION_WITH_MAPS = 2
_FILE = "model.safetensors"
_KEYS = ("format", "version", "config", "weights", "checksums", "settings", "notes", "source", "crc32")
_KINDS: dict[str, type[Int4Weight] | type[Int8Weight] | type[PackedTernary]] = {
    "int4": Int4Weight,
    "int8": Int8Weight,
    "ternary": PackedTernary,
}
# files that save() may write and therefore may replace
_OWN_FILES = {
    _FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
}


def save(model: LanguageModel, directory: str | os.PathLike[str], *, tokenizer: bool = True) -> Path:
    """Write a model as a directory that :func:`tilewright.models.load` reads back bit for bit.

    The directory appears complete or not at all; an older checkpoint in its place survives any failure.

    Args:
        tokenizer: also save the model's tokenizer, if it has one.

    Raises:
        FileExistsError: the directory holds something that is not a tilewright checkpoint.
        CheckpointError: the model's weights are not those of its configuration.
        ValueError: the model is linearized, or an activation map does not fit it.
    """
    model.require_softmax("save")
    check_maps(model.config, model.maps, "save")
    target = Path(directory)
    require_replaceable(target)
    check_weights(model.config, model.weights, model.source or "model")
    with_tokenizer = tokenizer and (model.tokenizer_factory is not None or "tokenizer" in model.__dict__)
    with atomic_directory(target) as partial:
        _write_weights(model, partial / _FILE)
        if with_tokenizer:
            model.tokenizer.save_pretrained(str(partial))
    return target


def require_replaceable(target: Path) -> None:
    """Raise FileExistsError unless nothing, or an earlier checkpoint, is at ``target``."""
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target}: is a file; name a directory for the checkpoint")
    present = {p.name for p in target.iterdir()}
    foreign = sorted(present - _OWN_FILES)
    if foreign or (present and not is_checkpoint(target)):
        raise FileExistsError(
            f"{target}: holds {foreign[0] if foreign else _FILE!r}, which is not part of a tilewright checkpoint; "
            "choose an empty or new directory"
        )


def _record(weight: Weight) -> dict[str, Any]:
    if isinstance(weight, Tensor):
        return {"kind": "tensor"}
    kind = next(name for name, kind in _KINDS.items() if isinstance(weight, kind))
    return {"kind": kind, "record": weight.metadata()}


def _fingerprint(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "crc32": zlib.crc32(raw)}


def header_checksum(header: dict[str, Any]) -> int:
    """CRC-32 of the header without its own key ``crc32``, in JSON with sorted keys."""
    rest = {key: value for key, value in header.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _write_weights(model: LanguageModel, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    parts: dict[str, Tensor] = {}
    for name, weight in model.weights.items():
        parts |= {name: weight} if isinstance(weight, Tensor) else weight.to_tensors(name)
    parts |= {name: part for place, one in model.maps.items() for name, part in _map_parts(place, one).items()}
    parts = {name: part.detach().cpu().contiguous() for name, part in parts.items()}
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION_WITH_MAPS if model.maps else VERSION,
        "config": model.config.to_dict(),
        "weights": {name: _record(weight) for name, weight in model.weights.items()},
        "checksums": {name: _fingerprint(part) for name, part in parts.items()},
        "settings": model.settings,
        "notes": model.notes,
        "source": model.source,
    }
    if model.maps:
        header["maps"] = {place: one.strength for place, one in model.maps.items()}
    header["crc32"] = header_checksum(header)
    try:
        save_file(parts, str(path), metadata={FORMAT: json.dumps(header, allow_nan=False)})
    except SafetensorError as wrong:
        raise OSError(f"{path.parent.parent / path.name}: cannot be written: {wrong}") from wrong


def _map_parts(place: str, one: ActivationMap) -> dict[str, Tensor]:
    return {f"maps.{place}.weight": one.weight, f"maps.{place}.bias": one.bias}


def _read_map(place: str, strength: Any, parts: dict[str, Tensor]) -> ActivationMap:
    """Take the parts of one activation map out of ``parts``."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise CheckpointError(
            f"{_FILE}: the map at {place[:120]!r} has strength {str(strength)[:40]}; a number is needed"
        )
    try:
        weight, bias = (parts.pop(f"maps.{place}.{part}") for part in ("weight", "bias"))
        return ActivationMap(weight, bias, strength)
    except KeyError as missing:
        raise CheckpointError(f"{_FILE}: tensor {missing} is missing") from None
    except ValueError as wrong:
        raise CheckpointError(f"{_FILE}: the map at {place[:120]!r}: {wrong}") from None


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory was written by :func:`save` (any version)."""
    path = directory / _FILE
    return path.is_file() and FORMAT in (open_safetensors(path).metadata() or {})


def load_checkpoint(directory: Path) -> LanguageModel:
    """Read a directory written by :func:`save`.

    Raises:
        CheckpointError: naming the key or tensor that is missing, unknown or different, with got and need.
    """
    file = open_safetensors(directory / _FILE)
    header = _read_header(file.metadata() or {})
    config = LlamaConfig.from_dict(header["config"])
    parts = _read_parts(file, header["checksums"])
    weights = {name: _rebuild(name, record, parts) for name, record in header["weights"].items()}
    maps = {place: _read_map(place, strength, parts) for place, strength in header.get("maps", {}).items()}
    if parts:
        raise CheckpointError(f"{_FILE}: tensor {sorted(parts)[0]!r} belongs to no weight of the header")
    try:
        check_maps(config, maps, directory.name)
    except ValueError as wrong:
        raise CheckpointError(str(wrong)) from None
    check_weights(config, weights, directory.name)
    from tilewright.models.tokenizer import saved_tokenizer

    factory = (lambda: saved_tokenizer(directory)) if (directory / "tokenizer.json").exists() else None
    return LanguageModel(
        config,
        weights,
        notes=list(header["notes"]),
        settings=header["settings"],
        source=header["source"],
        maps=maps,
        tokenizer_factory=factory,
    )


def _read_header(metadata: dict[str, str]) -> dict[str, Any]:
    if set(metadata) != {FORMAT}:
        raise CheckpointError(
            f"{_FILE}: the metadata must hold the one key {FORMAT!r}, it holds {sorted(metadata)[:4]}"
        )
    try:
        header = json.loads(metadata[FORMAT])
    except (ValueError, RecursionError) as wrong:
        raise CheckpointError(f"{_FILE}: the header is not valid JSON: {wrong}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{_FILE}: header key 'format' must be {FORMAT!r}")
    if header.get("version") not in (VERSION, VERSION_WITH_MAPS) or isinstance(header.get("version"), bool):
        raise CheckpointError(
            f"{_FILE}: header key 'version' is {str(header.get('version'))[:40]}, this tilewright reads {VERSION} and "
            f"{VERSION_WITH_MAPS}; use the tilewright that wrote it, or quantize again"
        )
    keys = (*_KEYS, "maps") if header["version"] == VERSION_WITH_MAPS else _KEYS
    for key in keys:
        if key not in header:
            raise CheckpointError(f"{_FILE}: header key {key!r} is missing")
    if unknown := sorted(header.keys() - set(keys)):
        raise CheckpointError(f"{_FILE}: header key {unknown[0][:60]!r} is unknown; known are {', '.join(keys)}")
    try:
        intact = header["crc32"] == header_checksum(header)
    except RecursionError:
        intact = False
    if not intact:
        raise CheckpointError(f"{_FILE}: the header does not match its own crc32; the file is damaged")
    kinds = {"config": dict, "weights": dict, "checksums": dict, "settings": dict, "notes": list, "source": str}
    kinds |= {"maps": dict} if "maps" in keys else {}
    for key, kind in kinds.items():
        if not isinstance(header[key], kind):
            raise CheckpointError(
                f"{_FILE}: header key {key!r} is a {type(header[key]).__name__}, a {kind.__name__} is needed"
            )
    if not all(isinstance(note, str) for note in header["notes"]):
        raise CheckpointError(f"{_FILE}: header key 'notes' must be a list of strings")
    return header


def _read_parts(file: Any, checksums: dict[str, Any]) -> dict[str, Tensor]:
    present = set(file.keys())
    for name in checksums:
        if name not in present:
            raise CheckpointError(f"{_FILE}: tensor {name[:120]!r} of the header is missing in the file")
    if extra := sorted(present - checksums.keys()):
        raise CheckpointError(f"{_FILE}: tensor {extra[0][:120]!r} is not in the header")
    parts = {}
    for name in present:
        part = read_tensor(file, name, _FILE)
        got = _fingerprint(part)
        if got != checksums[name]:
            raise CheckpointError(
                f"{_FILE}: tensor {name!r} is {got}, the header says {str(checksums[name])[:200]}; the file is damaged"
            )
        parts[name] = part
    return parts


def _rebuild(name: str, record: Any, parts: dict[str, Tensor]) -> Weight:
    """Take the parts of one weight out of ``parts`` and put it together."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind == "tensor" and set(record) == {"kind"}:
        if name not in parts:
            raise CheckpointError(f"{_FILE}: tensor {name!r} is missing")
        return parts.pop(name)
    if (
        not isinstance(kind, str)
        or kind not in _KINDS
        or set(record) != {"kind", "record"}
        or not isinstance(record["record"], dict)
    ):
        raise CheckpointError(
            f"{_FILE}: weight {name[:120]!r} has the record {str(record)[:120]}; a kind of tensor, "
            f"{', '.join(_KINDS)} is needed"
        )
    try:
        weight: Weight = _KINDS[kind].from_tensors(name, parts, record["record"])
    except (ValueError, KeyError, TypeError, OverflowError, RuntimeError) as wrong:
        raise CheckpointError(f"{_FILE}: weight {name!r}: {wrong}") from None
    assert not isinstance(weight, Tensor)
    for part in weight.to_tensors(name):
        parts.pop(part, None)
    return weight
