# SPDX-License-Identifier: Apache-2.0
"""Activation sparsity: fewer neurons a token. One folder per method, one interface for those that change a model.

A method that turns a loaded model into a sparse one is a subpackage with an attribute ``METHOD`` (:class:`Method`);
:func:`methods` finds them. Thresholds, what such methods decide, are :mod:`tilewright.sparsify.thresholds`.

>>> sorted(methods())
['cats']
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tilewright._methods import choose, packages_with

if TYPE_CHECKING:
    from tilewright.capture import Batch
    from tilewright.models.language_model import LanguageModel


class SparsifyModel(Protocol):
    """Every method's function: a new model; the given one is not changed."""

    def __call__(self, model: LanguageModel, config: Any, calibration_batches: Iterable[Batch]) -> LanguageModel: ...


@dataclass(frozen=True)
class Method:
    """A sparsifier: its name, its frozen config dataclass (with to_dict/from_dict) and its function."""

    name: str
    summary: str
    config: type[Any]
    sparsify_model: SparsifyModel


def methods() -> dict[str, Method]:
    """All sparsifiers by name; folders of the family that only measure are none."""
    return {one.name: one for one in packages_with("METHOD", __name__, __path__)}


def method(name: str) -> Method:
    """The sparsifier called ``name``.

    Raises:
        ValueError: there is none; near and existing names are listed.
    """
    return choose(methods(), name, "sparsification method")
