# SPDX-License-Identifier: Apache-2.0
"""Running the same code at each instruction-set level of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")


def isa_levels() -> tuple[str, ...]:
    """Levels that this machine has, lowest first."""
    from tilewright import _host

    return LEVELS[: LEVELS.index(_host.isa_detected()) + 1]


@contextmanager
def isa_level(name: str) -> Iterator[None]:
    """Use one level inside the block, the default again after it."""
    from tilewright import _native

    _native.require()
    torch.ops.tilewright.set_isa(name)
    try:
        yield
    finally:
        torch.ops.tilewright.set_isa("")
