# SPDX-License-Identifier: Apache-2.0
"""Layers built from the operators."""

from __future__ import annotations

from tilewright.nn.accelerate import Acceleration, accelerate
from tilewright.nn.linear import W4A8Linear
from tilewright.nn.matrix import BFloat16Linear, Int4Embedding, Int8Linear, PackedEmbedding
from tilewright.nn.token import GatedMLP, RMSNorm, RotaryAngles

__all__ = [
    "Acceleration",
    "BFloat16Linear",
    "GatedMLP",
    "Int4Embedding",
    "Int8Linear",
    "PackedEmbedding",
    "RMSNorm",
    "RotaryAngles",
    "W4A8Linear",
    "accelerate",
]
