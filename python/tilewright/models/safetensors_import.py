# SPDX-License-Identifier: Apache-2.0
"""transformers directories: config.json, one or several safetensors files, float or low-bit weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilewright.models.config import LlamaConfig, is_first_bitnet
from tilewright.models.errors import CheckpointError
from tilewright.models.language_model import LanguageModel, Weight, check_weights, expected_shapes

if TYPE_CHECKING:
    from safetensors import safe_open as SafeOpen

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_JSON_BYTES = 64 << 20
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def load_transformers(directory: Path, file: str | None = None) -> LanguageModel:
    """Load a transformers directory of the Llama family (float, GPTQ, AWQ, compressed-tensors, FBGEMM FP8, BitNet).

    Args:
        file: name of the one safetensors file to take; None finds model.safetensors or the index.

    Raises:
        CheckpointError: the directory is damaged, incomplete or of an unsupported kind.
    """
    raw = read_json(directory / "config.json")
    if isinstance(raw, dict):
        raw = _with_generation_config(raw, directory)
    config = LlamaConfig.from_transformers(raw)
    tensors = read_safetensors(directory) if file is None else dict(_read_file(directory / file, None))
    notes: list[str] = []
    from tilewright.models.low_bit_import import import_low_bit

    quantization = raw.get("quantization_config") or raw.get("compression_config")
    weights: dict[str, Weight] = dict(tensors)
    if quantization:
        weights = import_low_bit(quantization, tensors, config, notes)
    elif is_first_bitnet(raw):
        from tilewright.models.bitnet_import import import_first_bitnet

        weights = import_first_bitnet(tensors, config, notes)
    weights = _settle(config, weights, directory.name, notes)
    if quantization is None:
        _note_dtype(raw, weights, notes)
    from tilewright.models.tokenizer import directory_tokenizer

    return LanguageModel(
        config, weights, notes=notes, source=directory.name, tokenizer_factory=lambda: directory_tokenizer(directory)
    )


def _settle(config: LlamaConfig, weights: dict[str, Weight], where: str, notes: list[str]) -> dict[str, Weight]:
    """Drop buffers that carry nothing, resolve a duplicated tied head, and check what remains."""
    kept = {name: w for name, w in weights.items() if not name.endswith(".rotary_emb.inv_freq")}
    head = kept.get("lm_head.weight")
    if config.tie_word_embeddings and head is not None:
        embedding = kept.get("model.embed_tokens.weight")
        if embedding is None:
            kept["model.embed_tokens.weight"] = kept.pop("lm_head.weight")
        elif isinstance(head, Tensor) and isinstance(embedding, Tensor) and torch.equal(head, embedding):
            del kept["lm_head.weight"]
        else:
            raise CheckpointError(
                f"{where}: config.json ties the output head to the embedding, but lm_head.weight differs from it; "
                "set tie_word_embeddings to false or remove the tensor"
            )
    check_weights(config, kept, where)
    for name, weight in kept.items():
        if isinstance(weight, Tensor) and weight.dtype not in FLOAT_DTYPES:
            if weight.dtype != torch.float64:
                raise CheckpointError(
                    f"{where}: tensor {name!r} has dtype {weight.dtype}; float32, float16 or bfloat16 is needed"
                )
            kept[name] = weight.to(torch.float32)
            notes.append(f"{name}: float64 was rounded to float32")
    return {name: kept[name] for name in expected_shapes(config)}


def _note_dtype(raw: dict[str, Any], weights: dict[str, Weight], notes: list[str]) -> None:
    stated = raw.get("dtype", raw.get("torch_dtype"))
    found = sorted({str(w.dtype).removeprefix("torch.") for w in weights.values() if isinstance(w, Tensor)})
    if isinstance(stated, str) and found != [stated]:
        notes.append(
            f"config.json states {stated[:40]}, the tensors are {', '.join(found)}; the tensors' own types are used"
        )


def _with_generation_config(raw: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Chat models list all their end tokens only in generation_config.json."""
    path = directory / "generation_config.json"
    if not path.exists():
        return raw
    generation = read_json(path)
    if not isinstance(generation, dict):
        raise CheckpointError(f"generation_config.json: a JSON object is needed, got {type(generation).__name__}")
    chosen = {k: generation[k] for k in ("eos_token_id",) if generation.get(k) is not None}
    return raw | chosen


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size.

    Raises:
        CheckpointError: missing, too large, not UTF-8, not JSON, nested too deeply, or a key given twice.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name}: {size} bytes are too many for this file (limit {_MAX_JSON_BYTES})")
        return json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.name} is missing in {path.parent.name!r}; a transformers directory holds one"
        ) from None
    except OSError as wrong:
        raise CheckpointError(f"{path.name}: cannot be read: {wrong.strerror or wrong}") from wrong
    except UnicodeDecodeError as wrong:
        raise CheckpointError(f"{path.name}: is not UTF-8 at byte {wrong.start}") from None
    except RecursionError:
        raise CheckpointError(f"{path.name}: is nested too deeply") from None
    except CheckpointError as wrong:
        raise CheckpointError(f"{path.name}: {wrong}") from None
    except ValueError as wrong:
        raise CheckpointError(f"{path.name}: is not valid JSON: {wrong}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise CheckpointError(f"key {twice[:60]!r} is given twice")
    return found


def open_safetensors(path: Path) -> SafeOpen:
    """Open one safetensors file; its own checks of the header become CheckpointErrors."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing in {path.parent.name!r}") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, MemoryError) as wrong:
        raise CheckpointError(f"{path.name}: is not a sound safetensors file: {wrong}") from None


def read_tensor(file: SafeOpen, name: str, where: str) -> Tensor:
    """One tensor, copied out of the file's mapping so that nothing later depends on the file."""
    from safetensors import SafetensorError

    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as wrong:
        raise CheckpointError(f"{where}: tensor {name[:120]!r} cannot be read: {wrong}") from None
    return tensor.clone()


def read_safetensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, from ``model.safetensors`` or the shards of its index."""
    index = directory / _INDEX
    if (directory / _SINGLE).exists() or not index.exists():
        if not (directory / _SINGLE).exists():
            raise CheckpointError(_what_is_there(directory))
        return dict(_read_file(directory / _SINGLE, None))
    shards: dict[str, set[str]] = {}
    raw = read_json(index)
    mapping = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{_INDEX}: needs an object 'weight_map' from tensor to file")
    for tensor, file in mapping.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{_INDEX}: tensor {tensor[:120]!r} points to {str(file)[:80]!r}; a file name in the same "
                "directory is needed"
            )
        shards.setdefault(file, set()).add(tensor)
    tensors: dict[str, Tensor] = {}
    for shard, names in shards.items():
        tensors.update(_read_file(directory / shard, names))
    return tensors


def _read_file(path: Path, names: set[str] | None) -> Iterator[tuple[str, Tensor]]:
    file = open_safetensors(path)
    present = set(file.keys())
    if names is not None and present != names:
        odd = sorted(present ^ names)[0]
        raise CheckpointError(
            f"{path.name}: tensor {odd[:120]!r} is in {'the file' if odd in present else 'the index'} only"
        )
    for name in present:
        yield name, read_tensor(file, name, path.name)


def _what_is_there(directory: Path) -> str:
    pickled = sorted(p.name for p in directory.glob("*.bin"))
    gguf = sorted(p.name for p in directory.glob("*.gguf"))
    if gguf:
        return f"{directory.name!r} holds GGUF files; name one of them: {', '.join(gguf[:4])}"
    if pickled:
        return (
            f"{directory.name!r} holds pickled weights ({pickled[0]}), which can run code; "
            "save them as safetensors with transformers first"
        )
    return f"{directory.name!r} holds no {_SINGLE} and no {_INDEX}"
