# SPDX-License-Identifier: Apache-2.0
"""Which activations: names of modules by pattern, and the side of the module."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Transform = Callable[[Tensor], Tensor]
SIDES = ("input", "output")


@dataclass(frozen=True)
class Site:
    """A set of activations: modules by name pattern, and which side of them.

    pattern: glob over the names of ``named_modules()``, or ``re:`` and a regular expression that must
        match the whole name. ``""`` is the model itself.
    side: "input" (first argument of the module's forward) or "output" (its first result).
    transform: applied to every activation before anything else sees it (reshape to heads, rotate,
        take a norm...). It must keep the leading token dimensions. Not used by interventions.
    """

    pattern: str
    side: str = "output"
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"side={self.side!r} of site {self.pattern!r}: need 'input' or 'output'")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """``"pattern"``, ``"pattern@input"`` or ``"pattern@output"`` to a Site; a Site stays as it is."""
        if isinstance(text, Site):
            return text
        pattern, at, side = text.rpartition("@")
        return cls(pattern, side) if at else cls(text)

    def matches(self, name: str) -> bool:
        """Does the module called ``name`` belong to this site?"""
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], name) is not None
        return re.fullmatch(_glob(self.pattern), name) is not None


def _glob(pattern: str) -> str:
    """Regular expression of a dotted glob: ``**`` any text, ``*`` and ``?`` text without dots."""
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return "".join(wild.get(part, re.escape(part)) for part in parts)


@dataclass(frozen=True)
class Point:
    """One activation of one module: ``name`` is ``<module name>@<side>``."""

    module_name: str
    side: str
    transform: Transform | None = None

    @property
    def name(self) -> str:
        return f"{self.module_name}@{self.side}"


def resolve(model: nn.Module, site: str | Site) -> list[Point]:
    """All points of ``model`` that a site matches, in the order of ``named_modules()``.

    Raises:
        ValueError: nothing matches; the message lists the nearest names that exist.
    """
    site = Site.parse(site)
    names = [name for name, _ in model.named_modules()]
    matched = [name for name in names if site.matches(name)]
    if not matched:
        wanted = site.pattern.removeprefix("re:")
        near = nearest(wanted, names)
        raise ValueError(
            f"site {site.pattern!r} matches no module of {type(model).__name__}; "
            + (f"near names: {', '.join(near)}" if near else f"it has {', '.join(names[1:9])}")
        )
    return [Point(name, site.side, site.transform) for name in matched]


def nearest(wanted: str, names: list[str]) -> list[str]:
    """Existing names close to a pattern, compared with numbers blanked so that layers do not crowd them out."""
    blanked: dict[str, str] = {}
    for name in names:
        blanked.setdefault(re.sub(r"\d+", "*", name), name)
    close = difflib.get_close_matches(re.sub(r"\d+", "*", wanted), list(blanked), n=5, cutoff=0.5)
    return [blanked[c] for c in close]
