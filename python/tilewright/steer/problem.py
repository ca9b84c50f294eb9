# SPDX-License-Identifier: Apache-2.0
"""What a steering method learns from: a model, two batches of texts, the places of the maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.capture import ActivationMap
from tilewright.steer.activations import Collector, Pooling, Texts, encode, require_finite, select

FitMap = Callable[[Tensor, Tensor], ActivationMap]
"""(source [n, C], target [m, C]), pooled -> a map."""


@dataclass(frozen=True)
class Problem:
    """names: places of the maps. source, target: ``input_ids`` and ``attention_mask``."""

    model: nn.Module
    names: list[str]
    source: dict[str, Tensor]
    target: dict[str, Tensor]
    pooling: Pooling = "mean"

    @classmethod
    def of(
        cls,
        model: nn.Module,
        source: Texts,
        target: Texts,
        tokenizer: Any = None,
        *,
        modules: str | Sequence[str] = "norm",
        layers: Iterable[int] | None = None,
        pooling: Pooling = "mean",
    ) -> Problem:
        """From texts and a choice of modules; the errors of :func:`tilewright.steer.steer`."""
        names = select(model, modules, layers)
        return cls(model, names, encode(source, tokenizer, "source"), encode(target, tokenizer, "target"), pooling)

    def pooled(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Activations of the model as it is: [B, C] by place, in the order that the model computes them."""
        with torch.no_grad(), Collector(self.model, self.names, self.pooling) as run:
            seen = run(batch)
        require_finite(seen)
        return seen

    def closed_form(self, fit: FitMap, *, sequential: bool) -> dict[str, ActivationMap]:
        """Maps with a closed form, all in one pass over the source texts.

        sequential: every map is fitted to activations that the maps before it have changed already; else to those of
        the model as it is.
        """
        from tilewright.steer.activations import pool

        target = self.pooled(self.target)
        maps: dict[str, ActivationMap] = {}

        def change(name: str, x: Tensor, mask: Tensor) -> Tensor:
            pooled = pool(x, mask, self.pooling)
            require_finite({name: pooled})
            maps[name] = fit(pooled, target[name])
            return maps[name](x) if sequential else x

        with torch.no_grad(), Collector(self.model, self.names, self.pooling, change) as run:
            run(self.source)
        return maps
