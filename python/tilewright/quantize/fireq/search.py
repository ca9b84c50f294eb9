# SPDX-License-Identifier: Apache-2.0
"""AWQ-style choice of channel factors: Lambda = mean|x|^r by output error (FireQ, spec section 3, option)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.capture import Site
from tilewright.models.config import LlamaConfig
from tilewright.quantize.fireq.channels import CONSUMERS, expanded, geometric_mean, shared
from tilewright.reducers import MeanAbs, Reservoir, Several

SAMPLE_ROWS = 128


@dataclass(frozen=True)
class SiteInput:
    """Activations of one site in one layer: mean|x| per channel [K], and a sample of rows [<=128, K]."""

    mean: Tensor
    sample: Tensor


def input_site(site: str) -> Site:
    """The activations that the consumers of a channel-scaling site share, in all layers."""
    return Site(f"model.layers.*.{CONSUMERS[site][0]}", "input")


def input_reducer() -> Several:
    """What the search needs of those activations: the two fields of :class:`SiteInput`."""
    return Several(MeanAbs, lambda: Reservoir(SAMPLE_ROWS))


def activation_factors(mean: Tensor, r: float, site: str, config: LlamaConfig) -> Tensor:
    """Lambda = mean|x|^r per producer channel, divided by its geometric mean; a dead channel gets 1."""
    stat = shared(mean, site, config, "mean").float()
    factor = torch.where(stat > 0, stat, torch.ones(())) ** r
    return factor / geometric_mean(factor)


@dataclass(frozen=True)
class SiteError:
    """Output error of one site of one layer as a function of its factors.

    weights: the layer's float weights by name, under ``prefix``. x: rows of the input [n, K].
    round_weight and round_input: the quantizers, as float to float.
    """

    weights: Mapping[str, Tensor]
    prefix: str
    site: str
    x: Tensor
    round_weight: Callable[[Tensor], Tensor]
    round_input: Callable[[Tensor], Tensor]
    config: LlamaConfig

    def __call__(self, factor: Tensor) -> float:
        """Squared error of the consumers' outputs relative to their energy, under Lambda ``factor``."""
        columns = expanded(factor, self.site, self.config)
        rounded = self.round_input(self.x / columns)
        wrong = energy = 0.0
        for name in CONSUMERS[self.site]:
            weight = self.weights[f"{self.prefix}{name}.weight"]
            exact = self.x @ weight.T
            wrong += float((rounded @ self.round_weight(weight * columns).T - exact).square().sum())
            energy += float(exact.square().sum())
        return wrong / max(energy, torch.finfo(torch.float32).tiny)


def best_factors(error: SiteError, first: Tensor, mean: Tensor, exponents: tuple[float, ...]) -> tuple[Tensor, str]:
    """The factors of least output error among ``first`` (from weights) and mean|x|^r; with the winner's name."""
    candidates = {"weights": first}
    for r in exponents:
        candidates[f"mean|x|^{r:g}"] = activation_factors(mean, r, error.site, error.config)
    errors = {name: error(factor) for name, factor in candidates.items()}
    winner = min(errors, key=lambda name: errors[name])
    return candidates[winner], winner
