# SPDX-License-Identifier: Apache-2.0
"""A loaded model as a transformers model: low-bit linears, an INT4 cache, ``generate()`` as usual."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tilewright.formats.int4 import Int4Weight
from tilewright.models.config import LlamaConfig
from tilewright.models.language_model import LanguageModel
from tilewright.nn.linear import Activation, Mode, W4A8Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_transformers(
    model: LanguageModel,
    *,
    act: Activation = "fp8",
    mode: Mode = "exact",
    dtype: torch.dtype = torch.float32,
    dequantize: bool = False,
) -> PreTrainedModel:
    """Build the transformers model (Llama, Mistral or Qwen2 ForCausalLM) that holds these weights.

    INT4 linears become :class:`tilewright.nn.W4A8Linear`; everything else (norms, embedding, INT8 matrices) is
    float. For generation with an INT4 cache pass
    ``past_key_values=tilewright.models.Int4KVCache(model)`` to ``generate()``.

    Args:
        act: grid of the activations of INT4 linears, "fp8" or "int8".
        mode: "exact" or "fold", see :func:`tilewright.ops.int4_fp8_linear`.
        dtype: of the float parameters, and of the arithmetic between the linears.
        dequantize: make INT4 linears float too: the reference that the low-bit model is compared with.

    Returns:
        The model in eval mode, without gradients.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model.config.to_transformers())
    config.dtype = dtype
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    for name in model.weights:
        if not name.endswith(".key_scale"):
            _place(theirs, name, model, act, mode, dtype, dequantize)
    if model.config.tie_word_embeddings:
        theirs.lm_head.weight = theirs.model.embed_tokens.weight
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    generation_defaults(theirs, model.config)
    left = [n for n, t in [*theirs.named_parameters(), *theirs.named_buffers()] if t.is_meta]
    assert not left, f"parameters without a value: {left[:3]}"
    return theirs.eval().requires_grad_(False)


def generation_defaults(theirs: PreTrainedModel, config: LlamaConfig) -> None:
    """Tell transformers where a text begins and ends; padding falls back to an end token, so that batches work."""
    ends = list(config.eos_token_ids)
    defaults = theirs.generation_config
    assert defaults is not None
    defaults.bos_token_id, defaults.eos_token_id = config.bos_token_id, ends or None
    defaults.pad_token_id = ends[0] if config.pad_token_id is None and ends else config.pad_token_id


def _place(
    theirs: nn.Module, name: str, model: LanguageModel, act: Activation, mode: Mode, dtype: torch.dtype, dense: bool
) -> None:
    """Give one parameter its value, replacing the module around it where the weight is INT4."""
    owner_name, _, leaf = name.rpartition(".")
    owner = theirs.get_submodule(owner_name)
    weight = model.weights[name]
    if isinstance(weight, Int4Weight) and isinstance(owner, nn.Linear) and not dense:
        bias = model.weights.get(owner_name + ".bias")
        assert bias is None or isinstance(bias, Tensor)
        parent, _, child = owner_name.rpartition(".")
        layer = W4A8Linear(weight, None if bias is None else bias.to(dtype), act, mode)
        theirs.get_submodule(parent).register_module(child, layer)
        return
    if leaf == "bias" and isinstance(owner, W4A8Linear):
        return
    setattr(owner, leaf, nn.Parameter(model.dense(name, dtype).clone(), requires_grad=False))
