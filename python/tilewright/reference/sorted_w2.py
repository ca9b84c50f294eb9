# SPDX-License-Identifier: Apache-2.0
"""The squared 2-Wasserstein distance of one-dimensional samples, by torch.sort: any device and size."""

from __future__ import annotations

import torch
from torch import Tensor


def quantile_coupling(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which sorted sample of n meets which of m, and for how much of the mass: i, j int64 [K], share float64 [K].

    The breakpoints i/n and j/m are merged; in units of 1/(n m) they are whole numbers.
    """
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return starts // m, starts // n, (ends - starts).double() / (n * m)


def sorted_w2(z: Tensor, v: Tensor) -> Tensor:
    """``W2^2`` of each column of z [n, D] and v [m, D]: [D] in float32, float64 where z is."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    z = torch.sort(z.to(wide), dim=0, stable=True).values
    v = torch.sort(v.to(wide), dim=0, stable=True).values
    if len(z) == len(v):
        return (z - v).square().mean(0)
    i, j, share = quantile_coupling(len(z), len(v))
    apart = z[i.to(z.device)] - v[j.to(z.device)]
    return (apart.square() * share.to(apart)[:, None]).sum(0)
