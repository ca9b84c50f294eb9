# SPDX-License-Identifier: Apache-2.0
"""Strict conversion between a method's frozen config and plain JSON."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, TypeVar

C = TypeVar("C")


def strict(cls: type[C], raw: Any) -> dict[str, Any]:
    """The mapping ``raw`` as keyword arguments of the dataclass ``cls``.

    Raises:
        ValueError: ``raw`` is no mapping, or has a key that ``cls`` has not (near names are listed).
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{cls.__name__}: a dictionary is needed, got {type(raw).__name__}")
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{cls.__name__}: unknown key {str(key)[:60]!r}; {hint}")
    return dict(raw)


def require_one_of(owner: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise ValueError naming the field unless ``value`` is one of ``allowed`` (and of the same type)."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"{owner}: {name}={value!r}; need one of {', '.join(map(repr, allowed))}")


def require_positive(owner: str, name: str, value: Any) -> None:
    """Raise ValueError naming the field unless ``value`` is a finite number above 0."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    if not good:
        raise ValueError(f"{owner}: {name}={value!r}; a positive finite number is needed")
