# SPDX-License-Identifier: Apache-2.0
"""The proximal step of the sparse group lasso."""

from __future__ import annotations

from torch import Tensor


def prox_sparse_group(v: Tensor, t1: float, tg: float) -> Tensor:
    """``argmin_u 0.5 ||u - v||^2 + t1 ||u||_1 + tg ||u||_2``: soft threshold, then the group's length is cut by tg.

    Args:
        v: one group, any shape.
        t1, tg: at least 0.

    Raises:
        ValueError: a threshold is negative.
    """
    if t1 < 0 or tg < 0:
        raise ValueError(f"prox_sparse_group: t1 = {t1}, tg = {tg}, needed >= 0")
    soft = v.sign() * (v.abs() - t1).clamp_min(0)
    length = float(soft.norm())
    return soft * max(0.0, 1.0 - tg / length) if length > 0 else soft
