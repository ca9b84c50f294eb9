# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file or directory appears complete or not at all, also on a full disk or an interrupt."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")


def sync(path: Path) -> None:
    """Flush a file's or directory's data to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_write(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; renamed over ``target`` when the block ends.

    On any exception, KeyboardInterrupt included, the partial file is removed and ``target`` is as before.
    """
    final = Path(os.path.realpath(target))
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(final)
    try:
        yield partial
        sync(partial)
        partial.replace(final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(final.parent)


@contextlib.contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory beside ``target``; it takes the place of ``target`` when the block ends.

    An existing ``target`` is exchanged in one step where the system can (Linux), else moved aside and
    restored on failure, and then deleted. On any exception the new directory is removed and ``target`` is as before.
    """
    final = Path(os.path.realpath(target))
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(final)
    partial.mkdir()
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        _replace_directory(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(partial, ignore_errors=True)
    sync(final.parent)


def _replace_directory(new: Path, final: Path) -> None:
    """Put ``new`` in the place of ``final``; what was there is then at ``new``."""
    try:
        new.rename(final)
        return
    except OSError as wrong:
        if wrong.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(new, final):
        return
    old = _beside(final)
    final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        old.rename(final)
        raise
    old.rename(new)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)
