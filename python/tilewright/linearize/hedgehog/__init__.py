# SPDX-License-Identifier: Apache-2.0
"""Hedgehog (arXiv 2402.04347): softmax attention into linear attention, by learning feature maps that imitate it."""

from __future__ import annotations

from tilewright.linearize.hedgehog.diagnostics import attention_entropy, monotonicity
from tilewright.linearize.hedgehog.losses import attention_distill_loss
from tilewright.nn.hedgehog import (
    ELUFeatureMap,
    HedgehogFeatureMap,
    PerformerFeatureMap,
    ReLUFeatureMap,
    hedgehog_attention,
    windowed_hedgehog_attention,
)

__all__ = [
    "ELUFeatureMap",
    "HedgehogFeatureMap",
    "PerformerFeatureMap",
    "ReLUFeatureMap",
    "attention_distill_loss",
    "attention_entropy",
    "hedgehog_attention",
    "monotonicity",
    "windowed_hedgehog_attention",
]
