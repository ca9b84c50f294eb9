# SPDX-License-Identifier: Apache-2.0
"""Methods found by their folder: nothing to edit elsewhere when one is added."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def discover(package: str, path: Iterable[str]) -> dict[str, Any]:
    """The attribute ``METHOD`` of every folder of a package, by its ``name``."""
    found = {}
    for module in pkgutil.iter_modules(path):
        if module.ispkg:
            one = importlib.import_module(f"{package}.{module.name}").METHOD
            found[one.name] = one
    return found


def packages_with(attribute: str, package: str, path: Iterable[str]) -> Iterator[Any]:
    """``attribute`` of those folders of a package that have it."""
    for module in pkgutil.iter_modules(path):
        if module.ispkg:
            imported = importlib.import_module(f"{package}.{module.name}")
            if hasattr(imported, attribute):
                yield getattr(imported, attribute)


def modules(name: str) -> Iterator[str]:
    """``tilewright.<family>.<method>.<name>`` for every such file on disk; no package is imported to look."""
    import tilewright

    for family, family_path in _packages(list(tilewright.__path__)):
        for method, method_path in _packages(family_path):
            if any(module.name == name for module in pkgutil.iter_modules(method_path)):
                yield f"tilewright.{family}.{method}.{name}"


def _packages(path: list[str]) -> Iterator[tuple[str, list[str]]]:
    for module in pkgutil.iter_modules(path):
        if module.ispkg:
            yield module.name, [str(Path(p) / module.name) for p in path]


def choose(known: Mapping[str, T], name: str, what: str) -> T:
    """``known[name]``.

    Raises:
        ValueError: there is no such ``what``; near or all names are listed.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"{what} {name!r} is not known; {hint}")
    return known[name]
