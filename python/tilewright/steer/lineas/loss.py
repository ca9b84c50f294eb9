# SPDX-License-Identifier: Apache-2.0
"""The distributional loss: squared Wasserstein distances, summed over coordinates, of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tilewright.ops.sorted_w2 import sorted_w2

Normalize = Literal["none", "std"]


def distributional_losses(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], normalize: Normalize = "none"
) -> dict[str, Tensor]:
    """``Delta_l = sum_j W2^2(Z_l:j, V_l:j)`` of every place l: scalars, differentiable.

    Args:
        source: pooled activations [n, C_l]. target: [m, C_l] of the same places.
        normalize: "std" divides by the mean over coordinates of the target's variance (1 where that is 0), which makes
            places of different scale comparable; "none" is the paper's sum of raw values.
    """
    if normalize not in ("none", "std"):
        raise ValueError(f"normalize={normalize!r}, needed 'none' or 'std'")
    names = list(source)
    widths = [source[name].shape[1] for name in names]
    # One call for all places: columns are independent.
    costs = sorted_w2(
        torch.cat([source[name] for name in names], 1), torch.cat([target[name] for name in names], 1)
    ).split(widths)
    losses = {name: cost.sum() for name, cost in zip(names, costs, strict=True)}
    if normalize == "std":
        for name in names:
            variance = float(target[name].var(0, unbiased=False).mean())
            losses[name] = losses[name] / (variance if variance > 0 else 1.0)
    return losses
