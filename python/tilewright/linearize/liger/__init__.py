# SPDX-License-Identifier: Apache-2.0
"""Liger: gates from the key projection, half recurrence, half windowed softmax, then LoRA (arXiv 2503.01496)."""

from __future__ import annotations

from tilewright.linearize import Method
from tilewright.linearize.liger.config import LigerConfig, LigerRecipe
from tilewright.linearize.liger.method import (
    LigerAttention,
    attention,
    convert_to_liger,
    finetune,
    liger_attention,
)

METHOD = Method(
    "liger",
    "gates from the key projection, half gated recurrence, half windowed softmax, no new parameters; LoRA",
    LigerConfig,
    LigerRecipe,
    attention,
    finetune,
)

MIXERS = {"liger": "tilewright.linearize.liger.layer:LigerLinearAttention"}

__all__ = [
    "METHOD",
    "MIXERS",
    "LigerAttention",
    "LigerConfig",
    "LigerRecipe",
    "convert_to_liger",
    "finetune",
    "liger_attention",
]
