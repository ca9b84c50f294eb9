# SPDX-License-Identifier: Apache-2.0
"""Post-training quantizers for models of the Llama family: one folder per method, one interface for all.

A method is a subpackage with an attribute ``METHOD`` (:class:`Method`); :func:`methods` finds them.

>>> sorted(methods())
['crossquant', 'fireq', 'rtn']
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tilewright._methods import choose, discover

if TYPE_CHECKING:
    from tilewright.capture import Batch
    from tilewright.models.language_model import LanguageModel


class QuantizeModel(Protocol):
    """Every method's function: a new model; the given one is not changed."""

    def __call__(
        self, model: LanguageModel, config: Any, calibration_batches: Iterable[Batch] | None = None
    ) -> LanguageModel: ...


@dataclass(frozen=True)
class Method:
    """A quantizer: its name, its frozen config dataclass (with to_dict/from_dict) and its function."""

    name: str
    summary: str
    config: type[Any]
    quantize_model: QuantizeModel


def methods() -> dict[str, Method]:
    """All quantizers by name."""
    return discover(__name__, __path__)


def method(name: str) -> Method:
    """The quantizer called ``name``.

    Raises:
        ValueError: there is none; near and existing names are listed.
    """
    return choose(methods(), name, "quantization method")
