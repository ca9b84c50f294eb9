# SPDX-License-Identifier: Apache-2.0
"""The per-tensor scale p of FireQ (spec section 2): W is multiplied by p before FP8 group scales are taken."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from tilewright.formats.int4 import E4M3_LARGEST, E4M3_SMALLEST, LARGEST


def repo_per_tensor_scale(weight: Tensor, group_size: int) -> float:
    """The released code's search for p over 2^0 .. 2^14, for a weight [N, K].

    It stops at the first p for which some group's absmax exceeds 448, and among the smaller ones takes
    the smallest that minimises the summed shortfall of group absmax below 7 * 2^-9 (where the scale
    would fall under the smallest e4m3 number). For weights of usual size that is p = 1.
    """
    columns = pad(weight.detach().abs().float(), (0, -weight.shape[1] % group_size))
    absmax = columns.unflatten(1, (-1, group_size)).amax(-1).double()
    best, least = 1.0, float("inf")
    for exponent in range(15):
        p = 2.0**exponent
        if float(absmax.max()) * p > E4M3_LARGEST:
            break
        shortfall = float((LARGEST * E4M3_SMALLEST - absmax * p).clamp(min=0).sum())
        if shortfall < least:
            best, least = p, shortfall
    return best
