# SPDX-License-Identifier: Apache-2.0
"""Learned maps of a model: applied while a context lives, inverted, composed, folded, saved, given to the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from tilewright._files import atomic_write
from tilewright.capture import ActivationMap, Transform, intervened

if TYPE_CHECKING:
    from tilewright.models import LanguageModel

FORMAT, VERSION = "tilewright-steering", 1
_PARTS = ("weight", "bias", "low", "high")
Tokens = Literal["all", "generated"]


@dataclass(frozen=True)
class Steering:
    """Maps by module name (``name@input`` for inputs), in the order that the model applies them.

    Attributes:
        method: what learned them. settings: its options (JSON types). report: what it measured (JSON types).
    """

    maps: dict[str, ActivationMap]
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def transform(self, model: nn.Module, strength: float = 1.0, *, tokens: Tokens = "all") -> Iterator[None]:
        """While the context lives, activations go through the maps: forward passes, ``generate()``, training.

        strength: 0 changes nothing, bit for bit; negative values move the other way.
        tokens: "generated" leaves a prompt alone: calls with more than one token a sequence pass unchanged, so it needs
            a cache.

        Raises:
            ValueError: a place does not exist in this model.
        """
        if abs(strength) > 1:
            warnings.warn(f"strength = {strength} extrapolates beyond the learned maps", stacklevel=3)
        if tokens not in ("all", "generated"):
            raise ValueError(f"tokens={tokens!r}, needed 'all' or 'generated'")
        maps: dict[Any, Transform] = {
            name: one if tokens == "all" else _after_prompt(one) for name, one in self.at(strength).maps.items()
        }
        with intervened(model, maps if strength != 0.0 else {}):
            yield

    def at(self, strength: float) -> Steering:
        """All maps with their strength multiplied."""
        return self._with({name: one.at(strength) for name, one in self.maps.items()})

    def inverse(self, least: float = 1e-3) -> Steering:
        """Maps from target to source: ``(z - b) / w`` at each place, with |w| held at ``least`` or more."""
        return self._with({name: one.inverse(least) for name, one in self.maps.items()})

    def compose(self, other: Steering) -> Steering:
        """One set of maps for these, then ``other``'s at each place."""
        maps = dict(self.maps)
        for name, one in other.maps.items():
            maps[name] = maps[name].then(one) if name in maps else one
        return dataclasses.replace(self, maps=maps, method=f"{self.method} then {other.method}", report={})

    def support(self) -> float:
        """Share of the coordinates whose map is not the identity (w, b) = (1, 0)."""
        total = sum(one.width for one in self.maps.values())
        moved = sum(int(((one.weight != 1) | (one.bias != 0)).sum()) for one in self.maps.values())
        return moved / total if total else 0.0

    def fold_(self, model: nn.Module, strength: float = 1.0) -> None:
        """Change the model's weights so that it computes with the maps; see :mod:`tilewright.steer.fold`."""
        from tilewright.steer.fold import fold_

        fold_(model, self.at(strength).maps)

    def attach(self, model: LanguageModel, strength: float = 1.0) -> None:
        """Give the maps to a loaded model: its engine, its transformers form and its checkpoint all have them then.

        Raises:
            ValueError: a place is not one where the decode engine applies maps, or its width differs.
        """
        from tilewright.models.language_model import check_maps

        maps = dict(model.maps)
        for name, one in self.at(strength).maps.items():
            maps[name] = maps[name].then(one) if name in maps else one
        check_maps(model.config, maps, self.method or "steering")
        model.maps = maps

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, complete or not at all."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, one in self.maps.items():
            for part in _PARTS:
                if (value := getattr(one, part)) is not None:
                    tensors[f"{name}.{part}"] = value.detach().cpu().contiguous()
        header = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "settings": self.settings,
            "report": self.report,
            "strengths": {name: one.strength for name, one in self.maps.items()},
        }
        with atomic_write(path) as partial:
            save_file(tensors, str(partial), metadata={"tilewright": json.dumps(header, allow_nan=False)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Steering:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: it is another kind of file, of another version, or damaged; what and where is named.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; `tw steer fit` writes activation maps")
        try:
            with safe_open(str(file), "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except SafetensorError as wrong:
            raise ValueError(f"{file}: is not a safetensors file: {wrong}") from None
        return cls._parse(file, metadata, tensors)

    @classmethod
    def _parse(cls, file: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Steering:
        try:
            header = json.loads(metadata.get("tilewright", ""))
            known = header["format"] == FORMAT
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise ValueError(
                f"{file}: holds no activation maps; pass a file that `tw steer fit` or Steering.save wrote"
            )
        if header.get("version") != VERSION:
            raise ValueError(
                f"{file}: version {header.get('version')!r:.40}, this tilewright reads {VERSION}; fit again"
            )
        try:
            maps = {}
            for name, strength in header["strengths"].items():
                parts = {part: tensors.pop(f"{name}.{part}", None) for part in _PARTS}
                if parts["weight"] is None or parts["bias"] is None:
                    raise ValueError(f"the map at {name} is not complete")
                maps[name] = ActivationMap(**parts, strength=float(strength))  # type: ignore[arg-type]
            if tensors:
                raise ValueError(f"tensor {min(tensors)!r} belongs to no map")
            return cls(maps, str(header["method"]), dict(header["settings"]), dict(header["report"]))
        except (ValueError, TypeError, KeyError, AttributeError) as wrong:
            raise ValueError(f"{file}: damaged, {wrong}") from None

    def _with(self, maps: dict[str, ActivationMap]) -> Steering:
        return dataclasses.replace(self, maps=maps)


def _after_prompt(one: ActivationMap) -> Transform:
    def change(x: Tensor) -> Tensor:
        return x if x.dim() < 2 or x.shape[1] > 1 else one(x)

    return change
