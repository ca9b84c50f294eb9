# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal, silence anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, total: int | None = None, show: bool | None = None) -> Iterator[T]:
    """Yield ``items`` while a bar on stderr counts them.

    show: None shows the bar only when stderr is a terminal. ``total`` is asked from ``items`` if it has
    a length. rich is imported only when a bar is drawn.
    """
    if show is None:
        show = sys.stderr.isatty()
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=description, total=total, console=Console(stderr=True), transient=True)
