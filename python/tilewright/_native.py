# SPDX-License-Identifier: Apache-2.0
"""Loading the native libraries, once, and remembering why when that fails."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class LibraryStatus:
    """What became of one native library: its path, and the reason when it is not in use."""

    path: Path | None
    loaded: bool
    reason: str


def _folder() -> Path:
    host = importlib.import_module("tilewright._host")
    assert host.__file__ is not None
    return Path(host.__file__).parent / "lib"


def _load(path: Path) -> LibraryStatus:
    if not path.is_file():
        return LibraryStatus(path, False, f"{path.name} was not built; run `make build`")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return LibraryStatus(path, False, f"{path.name} does not load beside torch {torch.__version__}: {error}")
    return LibraryStatus(path, True, "")


@functools.cache
def cpu_library() -> LibraryStatus:
    """The CPU operators (`libtilewright_ops`)."""
    try:
        folder = _folder()
    except ImportError as error:
        return LibraryStatus(None, False, f"the native module tilewright._host is missing: {error}; run `make build`")
    return _load(folder / "libtilewright_ops.so")


@functools.cache
def cuda_library() -> LibraryStatus:
    """The CUDA operators (`libtilewright_cuda`), only where a CUDA device is usable."""
    cpu = cpu_library()
    if not cpu.loaded or cpu.path is None:
        return LibraryStatus(None, False, f"the CPU library comes first: {cpu.reason}")
    path = cpu.path.with_name("libtilewright_cuda.so")
    if not path.is_file():
        return LibraryStatus(path, False, "built without nvcc, so without CUDA")
    if not torch.cuda.is_available():
        return LibraryStatus(path, False, "torch.cuda.is_available() is False")
    return _load(path)


def require() -> None:
    """Load what this machine can use.

    Raises:
        ImportError: the CPU operators cannot be loaded; the message says why and what to do.
    """
    status = cpu_library()
    if not status.loaded:
        raise ImportError(f"tilewright's operators are unavailable: {status.reason}. `tw doctor` tells more.")
    cuda_library()
