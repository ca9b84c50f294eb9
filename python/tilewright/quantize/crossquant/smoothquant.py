# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant (arXiv 2211.10438) as a baseline: s_j = c_j^m / w_j^(1-m) in the place of CrossQuant's factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright.quantize.crossquant.apply import Choice, Choose, LinearInput, group_maxima, least_error
from tilewright.quantize.crossquant.config import CrossQuantConfig
from tilewright.quantize.crossquant.fold import Group


def smooth_factors(col_absmax: Tensor, weights: list[Tensor], migration: float) -> Tensor:
    """s [I], w_j the largest weight of column j over the linears that share the input; 1 where c or w is 0."""
    w = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    alive = (col_absmax > 0) & (w > 0)
    one = torch.ones_like(w)
    s = torch.where(alive, col_absmax, one).pow(migration) / torch.where(alive, w, one).pow(1 - migration)
    return s / s.double().log().mean().exp().float()


def smoothquant_choice(migrations: Sequence[float] = (0.5,)) -> Choose:
    """A ``choose`` for :func:`apply_crossquant_`: the migration of least output error for each group."""

    def choose(group: Group, weights: list[Tensor], inputs: list[LinearInput], config: CrossQuantConfig) -> Choice:
        c = group_maxima(group, inputs)
        factors = [group.rule.expanded(group.rule.shared(smooth_factors(c, weights, m))) for m in migrations]
        candidates = [Choice(f, 1.0, 1 - m, "tight", float("nan")) for f, m in zip(factors, migrations, strict=True)]
        return least_error(candidates, weights, inputs[0].sample, config)

    return choose
