# SPDX-License-Identifier: Apache-2.0
"""Hedgehog (arXiv 2402.04347): softmax attention into linear attention, by learning feature maps that imitate it."""

from __future__ import annotations

from tilewright.linearize import Method
from tilewright.linearize.hedgehog.config import HedgehogConfig, HedgehogRecipe
from tilewright.linearize.hedgehog.diagnostics import attention_entropy, monotonicity
from tilewright.linearize.hedgehog.distillation import distill, distillation_losses
from tilewright.linearize.hedgehog.losses import attention_distill_loss
from tilewright.linearize.hedgehog.method import convert_to_hedgehog, finetune_lora, train
from tilewright.linearize.hedgehog.module import (
    FeatureAttention,
    HedgehogAttention,
    attention,
    feature_attentions,
    softmax_teacher,
)
from tilewright.nn.hedgehog import (
    ELUFeatureMap,
    HedgehogFeatureMap,
    PerformerFeatureMap,
    ReLUFeatureMap,
    hedgehog_attention,
    windowed_hedgehog_attention,
)

METHOD = Method(
    name="hedgehog",
    summary="learned feature maps that imitate the softmax weights, then LoRA; optionally a softmax window",
    config=HedgehogConfig,
    recipe=HedgehogRecipe,
    attention=attention,
    train=train,
)

__all__ = [
    "METHOD",
    "ELUFeatureMap",
    "FeatureAttention",
    "HedgehogAttention",
    "HedgehogConfig",
    "HedgehogFeatureMap",
    "HedgehogRecipe",
    "PerformerFeatureMap",
    "ReLUFeatureMap",
    "attention_distill_loss",
    "attention_entropy",
    "convert_to_hedgehog",
    "distill",
    "distillation_losses",
    "feature_attentions",
    "finetune_lora",
    "hedgehog_attention",
    "monotonicity",
    "softmax_teacher",
    "train",
    "windowed_hedgehog_attention",
]
