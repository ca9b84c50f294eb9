# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal, silence anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(
    items: Iterable[T],
    description: str | Callable[[], str],
    *,
    total: int | None = None,
    show: bool | None = None,
    completed: int = 0,
) -> Iterator[T]:
    """Yield ``items`` while a bar on stderr counts them.

    description: a text, or a function that is asked for it after each item. show: None shows the bar only when stderr
    is a terminal. ``total`` is asked from ``items`` if it has a length. completed: what was done before the first item.
    rich is imported only when a bar is drawn.
    """
    if show is None:
        show = sys.stderr.isatty()
    if total is None and isinstance(items, Sized):
        total = completed + len(items)
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def text() -> str:
        return description if isinstance(description, str) else description()

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(text(), total=total, completed=completed)
        for item in items:
            yield item
            bars.update(task, advance=1, description=text())
