# SPDX-License-Identifier: Apache-2.0
"""Hedgehog: linear attention whose feature maps imitate softmax (arXiv 2402.04347)."""

from __future__ import annotations

from tilewright.nn.hedgehog.attention import WindowState, hedgehog_attention, windowed_hedgehog_attention
from tilewright.nn.hedgehog.feature_maps import (
    ELUFeatureMap,
    FeatureMap,
    HedgehogFeatureMap,
    PerformerFeatureMap,
    ReLUFeatureMap,
)
from tilewright.nn.hedgehog.layer import HedgehogLinearAttention

MIXERS = {"hedgehog": HedgehogLinearAttention}

__all__ = [
    "MIXERS",
    "ELUFeatureMap",
    "FeatureMap",
    "HedgehogFeatureMap",
    "HedgehogLinearAttention",
    "PerformerFeatureMap",
    "ReLUFeatureMap",
    "WindowState",
    "hedgehog_attention",
    "windowed_hedgehog_attention",
]
