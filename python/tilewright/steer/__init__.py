# SPDX-License-Identifier: Apache-2.0
"""Moving a model's behaviour at inference by affine maps on its activations: one call for all methods.

:func:`steer` learns maps from two sets of unpaired texts and gives a :class:`Steering`, which transforms a transformers
model while a context lives, folds into its weights, or goes into the decode engine. A method is an entry of ``METHODS``
in a subpackage; :func:`methods` finds them.

>>> sorted(methods())
['aura', 'diffmean', 'gaussian_act', 'iti_c', 'lin_act', 'lineas', 'mean_act']
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tilewright._methods import choose

if TYPE_CHECKING:
    from torch import nn

    from tilewright.steer.activations import Pooling, Texts
    from tilewright.steer.lineas import LinEAS
    from tilewright.steer.problem import Problem
    from tilewright.steer.steering import Steering

__all__ = ["LinEAS", "Method", "Steering", "method", "methods", "steer"]


class Fit(Protocol):
    """Every method's function: maps from what there is to learn from; ``config`` is the method's own."""

    def __call__(self, problem: Problem, config: Any, *, progress: bool | None = None) -> Steering: ...


@dataclass(frozen=True)
class Method:
    """A steering method: its name, its frozen dataclass of options, its function."""

    name: str
    summary: str
    config: type[Any]
    fit: Fit


def methods() -> dict[str, Method]:
    """All methods by name."""
    packages = [m.name for m in pkgutil.iter_modules(__path__) if m.ispkg]
    return {one.name: one for name in packages for one in importlib.import_module(f"{__name__}.{name}").METHODS}


def method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        ValueError: there is none; near and existing names are listed.
    """
    return choose(methods(), name, "steering method")


def steer(
    model: nn.Module,
    method: str = "lineas",
    *,
    source: Texts,
    target: Texts,
    tokenizer: Any = None,
    modules: str | Sequence[str] = "norm",
    layers: Iterable[int] | None = None,
    pooling: Pooling = "mean",
    progress: bool | None = None,
    **options: Any,
) -> Steering:
    """Learn activation maps that move what the model does on ``source`` texts to what it does on ``target`` texts.

    Nothing of the model is changed. Texts are not paired, and there may be different numbers of them.

    Args:
        model: a transformers model, or any module called with ``input_ids`` and ``attention_mask``.
        method: "lineas", "lin_act", "gaussian_act", "mean_act", "diffmean", "iti_c" or "aura".
        source, target: texts (with ``tokenizer``), or one list of token ids for each.
        modules: whose outputs are mapped: "norm" (the norms within blocks), "block" (whole blocks), or sites of
            :mod:`tilewright.capture`.
        layers: keep only the modules of these blocks; None: all.
        pooling: a text's activation is its "mean" over tokens, its "last" token, or the "max" of each coordinate.
        progress: a bar on stderr; by default only on a terminal.
        options: fields of the method's config, for example ``steps`` and ``gamma`` of
            :class:`tilewright.steer.lineas.LinEASConfig`, ``sequential`` of most others.

    Raises:
        ValueError: a text is empty, a site matches nothing, an option is unknown or out of range, or activations are
            not finite.
    """
    from tilewright.steer.problem import Problem

    found = choose(methods(), method, "steering method")
    try:
        config = found.config(**options)
    except TypeError as wrong:
        known = ", ".join(found.config.__dataclass_fields__)
        raise ValueError(f"steer: {method} has no such option ({wrong}); its options are: {known}") from None
    problem = Problem.of(model, source, target, tokenizer, modules=modules, layers=layers, pooling=pooling)
    return found.fit(problem, config, progress=progress)


_LAZY = {"LinEAS": "lineas", "Steering": "steering"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
