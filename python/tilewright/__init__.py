# SPDX-License-Identifier: Apache-2.0
"""tilewright: neural networks in few bits, in linear time and with few active neurons, and a look inside them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright import formats, models, nn, ops, quantize, reference, testing

__all__ = ["__version__", "formats", "models", "nn", "ops", "quantize", "reference", "testing"]

_LAZY = frozenset(__all__) - {"__version__"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"tilewright.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("tilewright")
    raise AttributeError(f"module 'tilewright' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
