# SPDX-License-Identifier: Apache-2.0
"""Proofs about a network's outputs over a set of inputs, one folder per method.

:func:`verify` and the bounds of :class:`BoundedModule` come from GenBaB (:mod:`tilewright.verify.genbab`).
"""

from __future__ import annotations

from typing import Any

from tilewright.verify import genbab
from tilewright.verify.genbab import __all__ as _names

__all__ = list(_names)


def __getattr__(name: str) -> Any:
    if name in _names:
        return getattr(genbab, name)
    raise AttributeError(f"module 'tilewright.verify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
