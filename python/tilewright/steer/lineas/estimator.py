# SPDX-License-Identifier: Apache-2.0
"""LinEAS as an estimator: made for a model, fitted to texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from tilewright.steer.activations import Pooling, Texts
from tilewright.steer.lineas.method import LinEASConfig, fit
from tilewright.steer.problem import Problem
from tilewright.steer.steering import Steering


class LinEAS:
    """:func:`tilewright.steer.steer` with ``method="lineas"``, in scikit-learn's form.

    Attributes:
        steering_: the learned maps, after :meth:`fit`.
        loss_history_: the total loss before each step.
        layers_: the loss of each place before the last step.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: str | Sequence[str] = "norm",
        pooling: Pooling = "mean",
        *,
        layers: Iterable[int] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.model, self.modules, self.pooling = model, modules, pooling
        self.layers, self.tokenizer = layers, tokenizer

    def fit(self, source_texts: Texts, target_texts: Texts, *, progress: bool | None = None, **options: Any) -> LinEAS:
        """Learn the maps; ``options`` are the fields of :class:`LinEASConfig`."""
        problem = Problem.of(
            self.model,
            source_texts,
            target_texts,
            self.tokenizer,
            modules=self.modules,
            layers=self.layers,
            pooling=self.pooling,
        )
        self.steering_: Steering = fit(problem, LinEASConfig(**options), progress=progress)
        self.loss_history_: list[float] = self.steering_.report["loss"]
        self.layers_: dict[str, float] = self.steering_.report["layers"]
        return self

    def transform(self, strength: float = 1.0) -> contextlib.AbstractContextManager[None]:
        """:meth:`Steering.transform` on the model."""
        return self.steering_.transform(self.model, strength)

    def support(self) -> float:
        """:meth:`Steering.support`."""
        return self.steering_.support()
