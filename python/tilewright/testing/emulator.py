# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels on this machine: an emulator of the GPU runs the same sources, and says what they do wrong."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

LIBRARY = "libtilewright_emulator.so"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    from tilewright import _native

    cpu = _native.cpu_library()
    if not cpu.loaded or cpu.path is None:
        return None, f"the CPU operators come first: {cpu.reason}"
    path = Path(os.environ.get("TILEWRIGHT_EMULATOR_LIBRARY", cpu.path.with_name(LIBRARY)))
    if not path.is_file():
        return None, f"{path.name} was not built; run `make build`"
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        return None, f"{path.name} does not load beside torch {torch.__version__}: {error}"
    library.tilewright_emulator_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    library.tilewright_emulator_launches.restype = ctypes.c_uint64
    return library, ""


def emulator_missing() -> str:
    """Why there is no emulator here; empty where there is one."""
    return _load()[1]


class Emulator:
    """What runs inside `emulated()`: its settings, and how many kernels it has run."""

    def __init__(self, library: ctypes.CDLL, seed: int, multiprocessors: int, strict: bool) -> None:
        self._library = library
        self._multiprocessors = multiprocessors
        self._strict = strict
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Another order in which threads run; 0 starts blocks in their order."""
        self._library.tilewright_emulator_configure(seed, self._multiprocessors, int(self._strict))

    def launches(self) -> int:
        """Kernels started since the process began."""
        return int(self._library.tilewright_emulator_launches())

    def forget_memory(self) -> None:
        self._library.tilewright_emulator_forget_memory()


def emulated_operators() -> list[str]:
    """Names of the operators that have a kernel in the emulator's library, such as `tilewright::hgrn`."""
    if _load()[0] is None:
        return []
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("tilewright::")]
    return sorted(n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "PrivateUse1"))


def _through_emulator(name: str, emulator: Emulator) -> Callable[..., Any]:
    packet, _, overload = name.removeprefix("tilewright::").partition(".")
    operator = getattr(getattr(torch.ops.tilewright, packet), overload or "default")

    def run(*args: Any, **kwargs: Any) -> Any:
        emulator.forget_memory()
        try:
            return operator._op_dk(torch._C.DispatchKey.PrivateUse1, *args, **kwargs)
        finally:
            emulator.forget_memory()

    return run


@contextmanager
def emulated(seed: int = 0, *, multiprocessors: int = 4, strict: bool = True) -> Iterator[Emulator]:
    """Inside the block the CPU's operators are the GPU's kernels, emulated, wherever the GPU has one.

    A kernel that does what a GPU would not forgive ends in a RuntimeError with the block, the thread and the reason.

    Args:
        seed: of the order in which the threads of a kernel run.
        multiprocessors: what a persistent kernel is told of the machine.
        strict: a kernel may only touch the memory of the tensors that its adapter handed to it.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"there is no emulator: {reason}")
    emulator = Emulator(library, seed, multiprocessors, strict)
    overrides = torch.library.Library("tilewright", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*overridden.*", category=UserWarning)  # on purpose, here
            for name in emulated_operators():
                overrides.impl(name, _through_emulator(name, emulator), "CPU", allow_override=True)
        yield emulator
    finally:
        overrides._destroy()
        emulator.seed(0)
