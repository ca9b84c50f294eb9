# SPDX-License-Identifier: Apache-2.0
"""What all quantizers of language models share: what they refuse, what they keep, what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tilewright.formats import Int4Weight
from tilewright.models.language_model import LanguageModel, Weight, linear_names, optional_shapes


def require_unquantized(model: LanguageModel) -> None:
    """Raise ValueError for a model that a quantizer here has already changed, or that is steered."""
    if model.maps:
        raise ValueError(
            f"{model.source or 'model'} is steered: its activation maps belong to activations before quantization; "
            "quantize the model without them and learn maps for the result"
        )
    if "method" in model.settings or any(name in model.weights for name in optional_shapes(model.config)):
        raise ValueError(
            f"{model.source or 'model'} was already quantized with {model.settings.get('method', 'FireQ')}; "
            "start from the original checkpoint"
        )


def quantized(
    model: LanguageModel,
    changed: Mapping[str, Weight],
    *,
    method: str,
    config: dict[str, Any],
    settings: dict[str, Any],
    notes: list[str],
) -> LanguageModel:
    """``model`` with some weights replaced or added, and a record of what was done."""
    return dataclasses.replace(
        model,
        weights={**model.weights, **changed},
        notes=[*model.notes, *notes],
        settings={**model.settings, "method": method, "config": config, **settings},
    )


def keeps_weights(model: LanguageModel, weights: str) -> bool:
    """Whether the option ``weights`` ("auto", "int4" or "keep") leaves this model's weights as they are.

    Raises:
        ValueError: "keep" for a model without any INT4 weight.
    """
    low_bit = any(isinstance(model.weights[name], Int4Weight) for name in linear_names(model.config))
    if weights == "keep" and not low_bit:
        raise ValueError("weights='keep' needs a checkpoint with INT4 weights, this one has none; use weights='int4'")
    return weights == "keep" or (weights == "auto" and low_bit)
