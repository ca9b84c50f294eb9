# SPDX-License-Identifier: Apache-2.0
"""A converted model as a folder: ``linearized.json``, ``model.safetensors``, the tokenizer.

The JSON object has exactly the keys format, version, method, config, layers, base (transformers' configuration of the
model before conversion), training (what the recipe reported), source, and checksums (tensor to dtype, shape, CRC-32).
Anything else - another version, an unknown method or key, a tensor too many or too few, a flipped bit - is an error
that names it. There is no ``config.json``: read as an ordinary model the weights would mean something else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilewright._files import atomic_directory
from tilewright.linearize import method, methods
from tilewright.linearize.conversion import Linearization, convert, decoder_layers, linearization
from tilewright.models.checkpoint import _fingerprint
from tilewright.models.errors import CheckpointError
from tilewright.models.language_model import all_finite
from tilewright.models.safetensors_import import open_safetensors, read_json, read_tensor
from tilewright.models.tokenizer import saved_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT, VERSION = "tilewright-linearized", 1
_HEADER, _WEIGHTS = "linearized.json", "model.safetensors"
_KEYS = ("format", "version", "method", "config", "layers", "base", "training", "source", "checksums")
# files of a folder that save() may replace
_OWN_FILES = {
    _HEADER,
    _WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
}


@dataclass(frozen=True)
class LinearizedConfig:
    """What generating needs to know of a model, by the names of :class:`tilewright.models.LlamaConfig`."""

    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]


@dataclass(eq=False)
class LinearizedModel:
    """A converted model with what belongs to it; ``training`` is what its recipe reported."""

    model: PreTrainedModel
    training: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    tokenizer_factory: Callable[[], PreTrainedTokenizerBase] | None = field(default=None, repr=False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, built at first use.

        Raises:
            CheckpointError: the folder brings none, or a damaged one.
        """
        if self.tokenizer_factory is None:
            raise CheckpointError(f"{self.source or 'model'}: no tokenizer came with this model")
        return self.tokenizer_factory()

    @property
    def config(self) -> LinearizedConfig:
        """Length limit and end tokens."""
        base: Any = self.model.config
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return LinearizedConfig(
            int(base.max_position_embeddings),
            tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        )

    @property
    def linearization(self) -> Linearization:
        """Method, config and layers."""
        found = linearization(self.model)
        assert found is not None
        return found


def is_linearized(directory: str | os.PathLike[str]) -> bool:
    """Whether the directory was written by :func:`save` (any version)."""
    return (Path(directory) / _HEADER).is_file()


def require_replaceable(target: str | os.PathLike[str]) -> None:
    """Raise FileExistsError unless nothing, an empty folder or an earlier converted model is at ``target``."""
    place = Path(target)
    if not place.exists():
        return
    if not place.is_dir():
        raise FileExistsError(f"{place}: is a file; name a directory for the model")
    present = {p.name for p in place.iterdir()}
    foreign = sorted(present - _OWN_FILES)
    if foreign or (present and _HEADER not in present):
        raise FileExistsError(
            f"{place}: holds {(foreign or sorted(present))[0]!r}, which is not part of a linearized model; choose an "
            "empty or new directory"
        )


def save(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    training: dict[str, Any] | None = None,
    source: str = "",
) -> Path:
    """Write a converted model as a directory that :func:`load` reads back bit for bit.

    The directory appears complete or not at all; an older one in its place survives any failure.

    Raises:
        FileExistsError: the directory holds something else.
        ValueError: the model is not converted, or its adapters are not merged.
    """
    target = Path(directory)
    require_replaceable(target)
    done = linearization(model)
    if done is None:
        raise ValueError(f"{type(model).__name__} is not linearized; convert it first")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in own_tensors(model).items()}
    if adapter := next((name for name in tensors if ".lora_" in name), None):
        raise ValueError(f"parameter {adapter!r} is of an adapter; call tilewright.adapt.merge_lora(model) first")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "method": done.method,
        "config": done.config.to_dict(),
        "layers": list(done.layers),
        "base": json.loads(model.config.to_json_string(use_diff=False)),
        "training": training or {},
        "source": source,
        "checksums": {name: _fingerprint(tensor) for name, tensor in tensors.items()},
    }
    with atomic_directory(target) as partial:
        _write(partial, header, tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
    return target


def _write(folder: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    (folder / _HEADER).write_text(json.dumps(header, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    try:
        save_file(tensors, str(folder / _WEIGHTS), metadata={"format": FORMAT})
    except SafetensorError as wrong:
        raise OSError(f"{_WEIGHTS}: cannot be written: {wrong}") from wrong


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a tied one once (under the name that comes first)."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def load(directory: str | os.PathLike[str]) -> LinearizedModel:
    """Read a directory written by :func:`save`; the model is in eval mode, without gradients.

    Raises:
        CheckpointError: naming what is missing, unknown, damaged or of another version.
    """
    place = Path(directory)
    header = _read_header(place)
    model = _skeleton(header)
    tensors = _read_tensors(place, header["checksums"])
    expected = own_tensors(model)
    for name, tensor in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{_WEIGHTS}: tensor {name!r} is missing")
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{_WEIGHTS}: tensor {name!r} has shape {list(tensors[name].shape)}, the configuration needs "
                f"{list(tensor.shape)}"
            )
    if extra := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{_WEIGHTS}: tensor {extra[0][:120]!r} does not belong to this model")
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    factory = (lambda: saved_tokenizer(place)) if (place / "tokenizer.json").exists() else None
    defaults: Any = model.generation_config
    if defaults.pad_token_id is None and defaults.eos_token_id is not None:
        ends = defaults.eos_token_id
        defaults.pad_token_id = ends[0] if isinstance(ends, list) else ends
    model.eval().requires_grad_(False)
    return LinearizedModel(model, header["training"], header["source"] or place.name, factory)


def _skeleton(header: dict[str, Any]) -> PreTrainedModel:
    """The converted model with values still to come (rotary frequencies are computed, everything else is loaded)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = methods()
    if header["method"] not in known:
        raise CheckpointError(
            f"{_HEADER}: method {str(header['method'])[:60]!r} is not known; this tilewright has {', '.join(known)}"
        )
    chosen = method(header["method"])
    try:
        config = chosen.config.from_dict(header["config"])
        base = AutoConfig.for_model(**header["base"])
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(base)
            convert(model, chosen, config, layers=header["layers"], inplace=True)
    except (ValueError, TypeError, KeyError, AttributeError) as wrong:
        raise CheckpointError(f"{_HEADER}: {wrong}") from wrong
    body: Any = model.model
    body.rotary_emb = type(body.rotary_emb)(config=base)
    assert len(decoder_layers(model)) == base.num_hidden_layers
    return model


def _read_header(place: Path) -> dict[str, Any]:
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such directory; a folder written by `tw linearize` is needed")
    header = read_json(place / _HEADER)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{_HEADER}: key 'format' must be {FORMAT!r}")
    if header.get("version") != VERSION or isinstance(header.get("version"), bool):
        raise CheckpointError(
            f"{_HEADER}: key 'version' is {str(header.get('version'))[:40]}, this tilewright reads {VERSION}; "
            "use the tilewright that wrote it, or linearize again"
        )
    for key in _KEYS:
        if key not in header:
            raise CheckpointError(f"{_HEADER}: key {key!r} is missing")
    if unknown := sorted(header.keys() - set(_KEYS)):
        raise CheckpointError(f"{_HEADER}: key {unknown[0][:60]!r} is unknown; known are {', '.join(_KEYS)}")
    kinds = {"method": str, "config": dict, "layers": list, "base": dict, "training": dict, "source": str}
    for key, kind in (kinds | {"checksums": dict}).items():
        if not isinstance(header[key], kind):
            raise CheckpointError(f"{_HEADER}: key {key!r} is a {type(header[key]).__name__}, needed {kind.__name__}")
    return header


def _read_tensors(place: Path, checksums: dict[str, Any]) -> dict[str, Tensor]:
    file = open_safetensors(place / _WEIGHTS)
    present = set(file.keys())
    for name in sorted(present ^ checksums.keys()):
        where = f"the file but not in {_HEADER}" if name in present else f"{_HEADER} but not in the file"
        raise CheckpointError(f"{_WEIGHTS}: tensor {name[:120]!r} is in {where}")
    tensors = {}
    for name in present:
        tensor = read_tensor(file, name, _WEIGHTS)
        got = _fingerprint(tensor)
        if got != checksums[name]:
            raise CheckpointError(
                f"{_WEIGHTS}: tensor {name!r} is {got}, {_HEADER} says {str(checksums[name])[:200]}; the file is "
                "damaged"
            )
        if not all_finite(tensor):
            raise CheckpointError(f"{_WEIGHTS}: tensor {name!r} holds NaN or infinite values; the file is damaged")
        tensors[name] = tensor
    return tensors
