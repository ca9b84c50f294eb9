# SPDX-License-Identifier: Apache-2.0
"""A loaded model as a transformers model: low-bit layers, attention over a low-bit cache, ``generate()`` as usual."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tilewright.capture import attach
from tilewright.formats.int4 import Int4Weight
from tilewright.formats.int8 import Int8Weight
from tilewright.formats.ternary import PackedTernary
from tilewright.models.config import LlamaConfig
from tilewright.models.engine import decided_formats
from tilewright.models.image import Activation, CacheFormat, QueryFormat, activation_scale_group, input_kind
from tilewright.models.language_model import LanguageModel, Weight, check_maps, linear_names, threshold_name
from tilewright.nn import (
    CATSMLP,
    BFloat16Linear,
    BitLinear,
    GatedMLP,
    Int4Embedding,
    Int8Linear,
    PackedEmbedding,
    RMSNorm,
    RotaryAngles,
    TernaryEmbedding,
    W4A8Linear,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


def to_transformers(
    model: LanguageModel,
    *,
    act: Activation | None = None,
    kv_bits: int | None = None,
    query: QueryFormat = "fp8",
    scale_group: int | None = None,
    dtype: torch.dtype = torch.float32,
    dequantize: bool = False,
) -> PreTrainedModel:
    """Build the transformers model (Llama, Mistral, Qwen2 or BitNet ForCausalLM) that holds these weights.

    A model with low-bit weights runs operator by operator through the decode engine's kernels, with the engine's
    formats: INT4 linears are :class:`tilewright.nn.W4A8Linear`, INT8 matrices :class:`tilewright.nn.Int8Linear`,
    ternary ones :class:`tilewright.nn.BitLinear`, float matrices are rounded to bfloat16, embedding and output head
    share one copy, attention reads keys and values rounded to ``kv_bits``. In float32 its logits are the bits of
    :meth:`tilewright.models.engine.Engine.logits`, hence greedy generation gives the engine's tokens. Any cache of
    ``generate()`` works; ``Int4KVCache(model)`` also stores four bits a number.

    A model of float weights alone, or one with ``dequantize``, keeps transformers' own arithmetic. ``model.maps``
    become forward hooks.

    Args:
        act, kv_bits, scale_group: as for :class:`tilewright.models.engine.Engine` and
            :func:`tilewright.models.image.compile`, with the same defaults.
        query: format of the queries that meet an INT4 cache.
        dtype: of the float parameters, and of what passes between the operators.
        dequantize: make all weights float: the reference that the low-bit model is compared with.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        ValueError: an option is none of its words, or does not fit the weights, or the model is linearized.
    """
    model.require_softmax("to_transformers")
    check_maps(model.config, model.maps, "to_transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model.config.to_transformers())
    config.dtype = dtype
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    low_bit = not dequantize and any(not isinstance(w, Tensor) for w in model.weights.values())
    if low_bit:
        decided, kv = decided_formats(model, act, kv_bits)
        _Builder(theirs, model, decided, activation_scale_group(decided, scale_group, model.weights), dtype).build()
        _attend_low_bit(theirs, model, kv, query)
    else:
        _place_floats(theirs, model, dtype)
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    _drop_neurons(theirs, model)
    generation_defaults(theirs, model.config)
    left = [n for n, t in [*theirs.named_parameters(), *theirs.named_buffers()] if t.is_meta]
    assert not left, f"parameters without a value: {left[:3]}"
    attach(theirs, model.maps)
    return theirs.eval().requires_grad_(False)


def generation_defaults(theirs: PreTrainedModel, config: LlamaConfig) -> None:
    """Tell transformers where a text begins and ends; padding falls back to an end token, so that batches work."""
    ends = list(config.eos_token_ids)
    defaults = theirs.generation_config
    assert defaults is not None
    defaults.bos_token_id, defaults.eos_token_id = config.bos_token_id, ends or None
    defaults.pad_token_id = ends[0] if config.pad_token_id is None and ends else config.pad_token_id


def _place_floats(theirs: PreTrainedModel, model: LanguageModel, dtype: torch.dtype) -> None:
    for name in model.weights:
        if not name.endswith((".key_scale", ".mlp.threshold")):
            owner, _, leaf = name.rpartition(".")
            value = model.dense(name, dtype).clone()
            setattr(theirs.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    if model.config.tie_word_embeddings:
        theirs.lm_head.weight = theirs.model.embed_tokens.weight
    # transformers' Llama has biases on all four linears of attention, or on none.
    for name, parameter in list(theirs.named_parameters()):
        if parameter.is_meta and name.endswith(".bias"):
            owner, _, leaf = name.rpartition(".")
            zeros = torch.zeros(parameter.shape, dtype=dtype)
            setattr(theirs.get_submodule(owner), leaf, nn.Parameter(zeros, requires_grad=False))


def _drop_neurons(theirs: PreTrainedModel, model: LanguageModel) -> None:
    """Put the model's thresholds of the gate activation, if it has any, into its MLPs."""
    for index in range(model.config.num_hidden_layers):
        if (threshold := model.weights.get(threshold_name(index))) is not None:
            assert isinstance(threshold, Tensor)
            layer = theirs.model.layers[index]
            mlp = layer.mlp
            layer.mlp = CATSMLP(mlp.gate_proj, mlp.up_proj, mlp.down_proj, threshold.squeeze())


class _Builder:
    """Replaces transformers' modules by layers over the engine's kernels."""

    def __init__(
        self, theirs: PreTrainedModel, model: LanguageModel, act: Activation, scale_group: int, dtype: torch.dtype
    ) -> None:
        self.theirs, self.model, self.dtype = theirs, model, dtype
        self.act, self.scale_group = act, scale_group

    def build(self) -> None:
        config = self.model.config
        for name in linear_names(config):
            self._put(name.removesuffix(".weight"), self._linear(name))
        for index in range(config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self._norm(prefix + norm)
            mlp = self.theirs.get_submodule(prefix + "mlp")
            gate, up, down = (mlp.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
            gated = GatedMLP(gate, up, down, config.hidden_act)
            if config.has_sub_norms:
                gated.ffn_sub_norm = self._rms_norm(prefix + "mlp.ffn_sub_norm")
                self._norm(prefix + "self_attn.attn_sub_norm")
            self._put(prefix + "mlp", gated)
        self._norm("model.norm")
        self._put("model.rotary_emb", RotaryAngles(config.rope_frequencies(), config.rotation_gain))
        head = self._linear(self.model.output_name)
        self._put(_HEAD, head)
        self._put(_EMBEDDING, self._embedding(head if config.tie_word_embeddings else None))

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        self.theirs.get_submodule(parent).register_module(child, module)

    def _norm(self, name: str) -> None:
        self._put(name, self._rms_norm(name))

    def _rms_norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.model.dense(name + ".weight", self.dtype), self.model.config.rms_norm_eps)

    def _linear(self, name: str) -> nn.Module:
        bias = self.model.weights.get(name.removesuffix("weight") + "bias")
        assert bias is None or isinstance(bias, Tensor)
        bias = None if bias is None else bias.to(self.dtype)
        weight = self._weight(name)
        if isinstance(weight, Int4Weight):
            # The engine calls "fp8-fold" what the layer calls act "fp8" in mode "fold".
            if self.act == "int8":
                return W4A8Linear(weight, bias, "int8", scale_group=self.scale_group or None)
            return W4A8Linear(weight, bias, "fp8", "fold" if self.act == "fp8-fold" else "exact")
        if isinstance(weight, PackedTernary):
            return BitLinear.from_packed(weight.convert("q2"), bias)
        return Int8Linear(weight, bias) if isinstance(weight, Int8Weight) else BFloat16Linear(weight, bias)

    def _weight(self, name: str) -> Weight:
        """A weight; gate and up in different formats become bfloat16, as in the engine's image."""
        weight = self.model.weights[name]
        for one, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
            if f".mlp.{one}." in name and not isinstance(weight, Tensor):
                beside = self.model.weights[name.replace(one, other)]
                if input_kind(beside) != input_kind(weight):
                    return weight.dequantize(torch.bfloat16)
        return weight

    def _embedding(self, tied: nn.Module | None) -> nn.Module:
        weight = self.model.weights[_EMBEDDING + ".weight"]
        if isinstance(weight, Int4Weight):
            return Int4Embedding(weight, self.dtype)
        if isinstance(weight, PackedTernary):
            return TernaryEmbedding(weight, self.dtype)
        matrix = tied if tied is not None else self._linear(_EMBEDDING + ".weight")
        assert isinstance(matrix, (Int8Linear, BFloat16Linear))
        return PackedEmbedding(matrix, self.dtype)


def _attend_low_bit(theirs: PreTrainedModel, model: LanguageModel, kv: CacheFormat, query: QueryFormat) -> None:
    from tilewright.models import hf_attention

    if query not in ("fp8", "float32"):
        raise ValueError(f"to_transformers: query = {query!r}, needed 'fp8' or 'float32'")
    formats = hf_attention.AttentionFormats(kv, query)
    for index in range(model.config.num_hidden_layers):
        name = f"model.layers.{index}.self_attn"
        scale = model.weights.get(name + ".key_scale")
        assert scale is None or isinstance(scale, Tensor)
        hf_attention.attach(theirs.get_submodule(name), formats, scale)
    theirs.set_attn_implementation(hf_attention.NAME)
