# SPDX-License-Identifier: Apache-2.0
"""Adapting a pretrained model with few new parameters."""

from __future__ import annotations

from tilewright.adapt.lora import (
    LoraConfig,
    LoraLinear,
    apply_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    save_lora,
)

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "apply_lora",
    "load_lora",
    "lora_parameters",
    "merge_lora",
    "save_lora",
]
