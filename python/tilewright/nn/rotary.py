# SPDX-License-Identifier: Apache-2.0
"""Rotary positions that train: applied to queries and keys [B, T, H, D], no tables and no buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.models.rope import RopeScaling, rope_frequencies


def apply_rotary(x: Tensor, positions: Tensor, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Turn the pairs ``(i, i + D/2)`` of each head by ``position * theta^(-2i/D)`` (arXiv 2104.09864, eq. 15).

    Args:
        x: [B, T, H, D], D even.
        positions: int64 [B, T] or [1, T].
        theta: base of the frequencies.
        scaling: a rule that changes them.

    Returns:
        The shape and dtype of x; angles are formed in float32 (float64 for float64).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequencies = rope_frequencies(theta, x.shape[-1], scaling).to(x.device, wide)
    angles = positions[..., None].to(wide) * frequencies
    gain = 1.0 if scaling is None else scaling.rotation_gain
    cosines, sines = (angles.cos() * gain)[:, :, None], (angles.sin() * gain)[:, :, None]
    first, second = x.to(wide).chunk(2, -1)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)
    return turned.to(x.dtype)
