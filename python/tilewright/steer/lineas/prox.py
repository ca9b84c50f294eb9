# SPDX-License-Identifier: Apache-2.0
"""The proximal step of the sparse group lasso."""

from __future__ import annotations

import torch
from torch import Tensor

# Bisections of the group's length: each halves what is unknown of it.
_BISECTIONS = 60


def prox_sparse_group(v: Tensor, t1: float, tg: float, metric: Tensor | None = None) -> Tensor:
    """``argmin_u 0.5 ||u - v||^2 + t1 ||u||_1 + tg ||u||_2``: soft threshold, then the group's length is cut by tg.

    Args:
        v: one group, any shape.
        t1, tg: at least 0.
        metric: c > 0 of v's shape: the first term is ``0.5 sum_i c_i (u_i - v_i)^2``, as behind a step that was divided
            by c (ProxGen, arXiv 2006.07065). Coordinates are cut by t1 / c_i then, and the group's length r solves
            ``sum_i (c_i s_i / (c_i r + tg))^2 = 1``, s being what the soft threshold left. None: 1.

    Raises:
        ValueError: a threshold is negative, or the metric not positive.
    """
    if t1 < 0 or tg < 0:
        raise ValueError(f"prox_sparse_group: t1 = {t1}, tg = {tg}, needed >= 0")
    if metric is None:
        soft = v.sign() * (v.abs() - t1).clamp_min(0)
        length = float(soft.norm())
        return soft * max(0.0, 1.0 - tg / length) if length > 0 else soft
    if not bool((metric > 0).all()):
        raise ValueError(f"prox_sparse_group: metric holds {float(metric.min()):g}, needed > 0")
    soft = v.sign() * (v.abs() - t1 / metric).clamp_min(0)
    if tg == 0.0:
        return soft
    pull = (metric * soft).double()
    if float(pull.norm()) <= tg:
        return torch.zeros_like(v)
    return soft * (metric / (metric + tg / _length(pull, metric.double(), tg, float(soft.norm()))))


def _length(pull: Tensor, metric: Tensor, tg: float, most: float) -> float:
    """r in (0, most] with ``||pull / (metric r + tg)|| = 1``; the left side falls in r."""
    low, high = 0.0, most
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if float((pull / (metric * middle + tg)).norm()) > 1:
            low = middle
        else:
            high = middle
    return high
