# SPDX-License-Identifier: Apache-2.0
"""BitNet models trained here, as loaded models that save, evaluate and run on the decode engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tilewright.formats.ternary import TernaryFormat
from tilewright.models.config import LlamaConfig
from tilewright.models.language_model import LanguageModel, Weight, check_weights, expected_shapes
from tilewright.nn.bitnet.linear import BitLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STORED: TernaryFormat = "t5"


def from_bitnet(model: PreTrainedModel, tokenizer: Any = None, *, format: TernaryFormat = _STORED) -> LanguageModel:
    """A transformers model (BitNet, or another of the Llama family) with :class:`BitLinear` layers, ternary.

    Args:
        model: latent or packed BitLinear layers become PackedTernary weights, other matrices bfloat16, which is how the
            engine holds them; vectors keep their dtype.
        tokenizer: of transformers, or None.
        format: packing of the ternary weights; "t5", 1.6 bits a weight, is the smallest.

    Raises:
        CheckpointError: an architecture or a set of weights that tilewright does not load.
        ValueError: a BitLinear has a norm of its own, which the checkpoint format has no place for.
    """
    config = LlamaConfig.from_transformers(model.config.to_dict())
    weights: dict[str, Weight] = {}
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            if module.norm is not None:
                raise ValueError(f"from_bitnet: {name} has a norm of its own; build the model with build_bitnet()")
            weights[f"{name}.weight"] = module.ternary(format)
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if name not in weights and not (tied and name == "lm_head.weight"):
            value = parameter.detach()
            weights[name] = value.to(torch.bfloat16) if value.dim() == 2 else value.clone()
    source = type(model).__name__
    check_weights(config, weights, source)
    ordered = {name: weights[name] for name in expected_shapes(config)}
    loaded = LanguageModel(config, ordered, source=source)
    if tokenizer is not None:
        loaded.tokenizer = tokenizer
    return loaded
