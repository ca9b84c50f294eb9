# SPDX-License-Identifier: Apache-2.0
"""Thresholds of gated MLPs: what every method of this family produces, and how it is stored.

A neuron j of an MLP ``y = W_down h``, ``h = a * (W_up x)``, ``a = act(W_gate x)`` is dropped for a token where its
score
is below its threshold; a NaN score is never below. ``score`` says what is compared:

- ``"gate"``: ``|a_j|``, known before W_up is read (CATS);
- ``"hidden"``: ``|h_j|``, the input of the down projection (CETT).

A criterion that weights neurons (by the norm of their column of W_down, say) divides the threshold instead: one value a
neuron. A threshold of 0 keeps everything, of infinity drops everything that is finite.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tilewright._files import atomic_write

Score = Literal["gate", "hidden"]
SCORES: tuple[Score, ...] = ("gate", "hidden")

_FORMAT, _VERSION = "tilewright-thresholds", 1
_KEYS = {"format", "version", "score", "about"}


@dataclass(frozen=True, eq=False)
class Thresholds(Mapping[str, Tensor]):
    """``{name of the MLP module: threshold}``: float32 on the CPU, a scalar [] or one value a neuron [m], never below
    0.

    Attributes:
        layers: the thresholds, by module name ("model.layers.0.mlp").
        score: what is compared with them, "gate" or "hidden".
        about: how they came to be (method, sparsity, tokens): plain JSON values.

    Raises:
        ValueError: a threshold is negative, NaN, neither a scalar nor a vector, or the score is unknown.
    """

    layers: Mapping[str, Tensor]
    score: Score = "gate"
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score = {self.score!r}, needed one of {', '.join(map(repr, SCORES))}")
        checked = {name: _checked(name, value) for name, value in self.layers.items()}
        object.__setattr__(self, "layers", checked)

    def __getitem__(self, name: str) -> Tensor:
        return self.layers[name]

    def __iter__(self) -> Any:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def _checked(name: str, value: Tensor | float) -> Tensor:
    value = torch.as_tensor(value).detach().to("cpu", torch.float32).clone()
    if value.dim() > 1 or value.numel() == 0:
        raise ValueError(f"threshold of {name} has shape {list(value.shape)}; a scalar or one value a neuron is needed")
    if not bool((value >= 0).all()):
        raise ValueError(f"threshold of {name} is negative or NaN; thresholds are compared with magnitudes")
    return value


def save_thresholds(thresholds: Thresholds, path: str | os.PathLike[str]) -> Path:
    """Write to ``path``: safetensors where it ends in ``.safetensors``, JSON where it ends in ``.json``.

    JSON holds ``{"format", "version", "score", "about", "thresholds": {name: number, "inf", or a list}}``; both restore
    every bit. The file appears complete or not at all.

    Raises:
        ValueError: another ending.
    """
    target = Path(path)
    header = {"format": _FORMAT, "version": _VERSION, "score": thresholds.score, "about": thresholds.about}
    ending = _ending(target)
    with atomic_write(target) as partial:
        if ending == ".json":
            body = {name: _to_json(value) for name, value in thresholds.items()}
            partial.write_text(json.dumps({**header, "thresholds": body}, indent=1, allow_nan=False) + "\n")
        else:
            from safetensors.torch import save_file

            metadata = {_FORMAT: json.dumps(header, allow_nan=False)}
            save_file(dict(thresholds.layers), str(partial), metadata=metadata)
    return target


def load_thresholds(path: str | os.PathLike[str]) -> Thresholds:
    """Read what :func:`save_thresholds` wrote.

    Raises:
        ValueError: the file is no such file, or is damaged; what is wrong is named.
    """
    source = Path(path)
    raw, values = (_read_json if _ending(source) == ".json" else _read_safetensors)(source)
    _require(source, raw.get("format") == _FORMAT, f"is not a {_FORMAT} file")
    _require(source, raw.get("version") == _VERSION, f"has version {raw.get('version')!r}, {_VERSION} is read here")
    _require(source, set(raw) == _KEYS, f"has the keys {sorted(raw)}, {sorted(_KEYS)} are needed")
    _require(source, isinstance(raw["about"], dict), "has an 'about' that is no object")
    try:
        return Thresholds(values, cast("Score", raw["score"]), raw["about"])
    except ValueError as wrong:
        raise ValueError(f"{source}: {wrong}") from None


def _ending(path: Path) -> str:
    if path.suffix not in (".json", ".safetensors"):
        raise ValueError(f"{path}: thresholds are kept in .json or .safetensors files; give the name such an ending")
    return path.suffix


def _require(source: Path, holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"{source}: {problem}; write it with save_thresholds")


def _to_json(value: Tensor) -> Any:
    one = [number if math.isfinite(number) else "inf" for number in value.reshape(-1).tolist()]
    return one[0] if value.dim() == 0 else one


def _from_json(source: Path, name: str, value: Any) -> Tensor:
    numbers = value if isinstance(value, list) else [value]
    good = all(n == "inf" or (isinstance(n, (int, float)) and not isinstance(n, bool)) for n in numbers)
    _require(source, good, f"has a threshold of {name!r} that is no number, 'inf' or list of such")
    tensor = torch.tensor([float(n) for n in numbers], dtype=torch.float32)
    return tensor if isinstance(value, list) else tensor.reshape(())


def _read_json(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        raw = json.loads(source.read_text())
    except (ValueError, RecursionError) as wrong:
        raise ValueError(f"{source}: is not valid JSON: {wrong}") from None
    _require(source, isinstance(raw, dict) and isinstance(raw.get("thresholds"), dict), "has no object 'thresholds'")
    values = {name: _from_json(source, name, value) for name, value in raw.pop("thresholds").items()}
    return raw, values


def _read_safetensors(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(source), framework="pt") as file:
            metadata = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        raw = json.loads(metadata.get(_FORMAT, "{}"))
    except (SafetensorError, ValueError, RecursionError) as wrong:
        raise ValueError(f"{source}: cannot be read: {wrong}") from None
    _require(source, isinstance(raw, dict), f"is not a {_FORMAT} file")
    return raw, values
