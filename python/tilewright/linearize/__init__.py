# SPDX-License-Identifier: Apache-2.0
"""Pretrained softmax models turned into linear-time ones: one folder per method, one interface for all.

A method is a subpackage with an attribute ``METHOD`` (:class:`Method`); :func:`methods` finds them. What all of them
share lives here: replacing the attention of chosen layers (:mod:`tilewright.linearize.conversion`), the replaced module
and its cache (:mod:`~tilewright.linearize.attention`, :mod:`~tilewright.linearize.cache`), real text
(:mod:`~tilewright.linearize.text`), tuning by adapters (:mod:`~tilewright.linearize.tuning`) and folders that hold a
converted model (:mod:`~tilewright.linearize.checkpoint`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tilewright._methods import choose, discover

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from tilewright.linearize.attention import ConvertedAttention
    from tilewright.linearize.checkpoint import LinearizedModel, is_linearized, load, save
    from tilewright.linearize.conversion import Linearization, convert, layers_to_convert, linearization
    from tilewright.linearize.tuning import Batches

__all__ = [
    "ConvertedAttention",
    "Linearization",
    "LinearizedModel",
    "Method",
    "Train",
    "convert",
    "is_linearized",
    "layers_to_convert",
    "linearization",
    "load",
    "method",
    "methods",
    "save",
]


class Train(Protocol):
    """Every method's recipe: trains a converted model in place and returns what it measured (JSON values).

    teacher: the model before conversion, for methods that imitate it; it is not changed.
    batches: the batch of a number, inputs and labels int64 [B, T] (:class:`tilewright.data.bytes.ByteWindows`).
    directory: where to keep what an interrupted training needs to go on, and to look for it; None: nowhere.
    """

    def __call__(
        self,
        model: PreTrainedModel,
        batches: Batches,
        recipe: Any,
        *,
        teacher: PreTrainedModel | None = None,
        directory: Path | None = None,
        progress: bool | None = None,
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Method:
    """A way to linearize.

    config: frozen dataclass of what decides the converted model's function; saved with the model.
    recipe: frozen dataclass of what decides its training; both have ``to_dict`` and ``from_dict``.
    attention: makes the converted module from one of transformers' attention modules (whose projections it takes
        over) and a config.
    train: the recipe's function.
    """

    name: str
    summary: str
    config: type[Any]
    recipe: type[Any]
    attention: Callable[[nn.Module, Any], ConvertedAttention]
    train: Train


def methods() -> dict[str, Method]:
    """All methods by name."""
    return discover(__name__, __path__)


def method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        ValueError: there is none; near and existing names are listed.
    """
    return choose(methods(), name, "linearization method")


_LAZY = {
    "ConvertedAttention": "attention",
    "Linearization": "conversion",
    "LinearizedModel": "checkpoint",
    "convert": "conversion",
    "is_linearized": "checkpoint",
    "layers_to_convert": "conversion",
    "linearization": "conversion",
    "load": "checkpoint",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
