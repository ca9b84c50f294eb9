# SPDX-License-Identifier: Apache-2.0
"""Does the decomposition measure what it says? Activations whose dense part and whose introduced error are known.

Sae(x) is taken as the true sparse signal x'. Its code without the least active latents is what an SAE would find, so
the dropped ones are features that were not learned; Gaussian noise added to x' is a dense part that the activation has
and the SAE misses, noise added to the reconstruction is error that the SAE introduces. The linear estimate should
follow the first, the nonlinear one the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.inspect.sae.rows import Rows
from tilewright.inspect.sae_dark_matter.least_squares import LeastSquares

LEVELS = (0.0, 1.0, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Simulation:
    """dense, introduced: standard deviations of the grid's axes. linear, nonlinear: FVU estimates [dense, introduced],
    over the variance of x'. correlations[i, j]: of truth i with estimate j, both in (dense, introduced) order, over the
    grid. idempotence: sum ||Sae(x') - x'||^2 / sum ||x' - mean||^2, small if Sae(Sae(x)) is close to Sae(x).
    """

    dense: tuple[float, ...]
    introduced: tuple[float, ...]
    linear: Tensor
    nonlinear: Tensor
    correlations: Tensor
    idempotence: float


@torch.no_grad()
def introduced_error_simulation(
    sae: Any,
    x: Tensor | Rows,
    *,
    dense: Sequence[float] = LEVELS,
    introduced: Sequence[float] = LEVELS,
    drop: float = 0.2,
    unit: float | None = None,
    ridge: float | None = None,
    seed: int = 0,
) -> Simulation:
    """Estimate linear and nonlinear error on a grid of known ones.

    x: rows [n, d]; the first half fits, the second is measured. drop: share of each token's active latents, least
    active first, that the SAE misses. Noise has standard deviation level x unit in each dimension; unit: a quarter of
    the root mean square of x' if not given.

    Raises:
        ValueError: drop outside [0, 1), fewer than two levels, or too few tokens for the regression.
    """
    if not 0 <= drop < 1 or len(dense) < 2 or len(introduced) < 2:
        raise ValueError(f"drop={drop}, {len(dense)} and {len(introduced)} levels; need 0 <= drop < 1, two levels each")
    rows = x if isinstance(x, Rows) else Rows(x)
    true, found, again = (torch.cat(part) for part in zip(*(_found(sae, b, drop) for b in rows.blocks()), strict=True))
    spread = float((true - true.mean(0)).double().square().sum())
    unit = float((true - true.mean(0)).square().mean().sqrt()) / 4 if unit is None else unit
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(true.shape, generator=generator) * unit for _ in range(2)]
    half = len(true) // 2
    linear, nonlinear = torch.empty(len(dense), len(introduced)), torch.empty(len(dense), len(introduced))
    share = float((true[half:] - true[half:].mean(0)).double().square().sum())
    for i, a in enumerate(dense):
        signal = true + a * noise[0]
        for j, r in enumerate(introduced):
            error = signal - (found + r * noise[1])
            fit = LeastSquares(true.shape[1], true.shape[1], intercept=True, ridge=ridge)
            fit.update(signal[:half], error[:half])
            rest = error[half:] - fit.solve()(signal[half:])
            nonlinear[i, j] = float(rest.double().square().sum()) / share
            linear[i, j] = float(error[half:].double().square().sum()) / share - nonlinear[i, j]
    grid = torch.meshgrid(torch.tensor(dense), torch.tensor(introduced), indexing="ij")
    table = torch.stack([g.flatten().double() for g in (*grid, linear, nonlinear)])
    return Simulation(
        tuple(dense),
        tuple(introduced),
        linear,
        nonlinear,
        torch.corrcoef(table)[:2, 2:],
        float((again - true).double().square().sum()) / spread,
    )


def _found(sae: Any, x: Tensor, drop: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x' = Sae(x), what the SAE finds in x' without its least active latents, Sae(x'))."""
    true = sae.decode(sae.encode(x))
    latents = sae.encode(true)
    again = sae.decode(latents)
    count = (latents > 0).sum(1)
    kept = count - (drop * count).floor().long()
    order = latents.argsort(1, descending=True).argsort(1)
    return true, sae.decode(torch.where(order < kept[:, None], latents, 0)), again
