# SPDX-License-Identifier: Apache-2.0
"""A loaded model: its architecture, its weights by transformers' names, its tokenizer on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilewright.capture.activation_map import ActivationMap
from tilewright.formats.int4 import Int4Weight
from tilewright.formats.int8 import Int8Weight
from tilewright.formats.ternary import PackedTernary
from tilewright.models.config import LlamaConfig
from tilewright.models.errors import CheckpointError
from tilewright.models.mixers import LinearMixer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Weight = Tensor | Int4Weight | Int8Weight | PackedTernary
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# Parts of a layer whose output has the width of the residual stream.
HIDDEN_MAPS = (
    "input_layernorm",
    "self_attn",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp",
    "mlp.down_proj",
)


@dataclass(eq=False)
class LanguageModel:
    """A Llama-family model, framework-free.

    ``weights`` maps transformers' parameter names to a float tensor, an Int4Weight, an Int8Weight or a PackedTernary.
    A tied output head has no ``lm_head.weight``. ``settings`` holds what a quantizer decided beside
    the weights (method, activation and cache formats), ``notes`` what a reader should know about the
    import (a tensor kept in float because its format has no exact low-bit form here, for example).
    ``mixers`` says, by layer index, which layers have linear attention in place of softmax attention; their
    parameters are among the weights. ``maps`` steers the model: an affine map for each of some activations, by the
    module's name (:func:`map_widths`); every runtime of the model applies them.
    """

    config: LlamaConfig
    weights: dict[str, Weight]
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    mixers: dict[int, LinearMixer] = field(default_factory=dict)
    maps: dict[str, ActivationMap] = field(default_factory=dict)
    tokenizer_factory: Callable[[], PreTrainedTokenizerBase] | None = field(default=None, repr=False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The transformers tokenizer, built at first use.

        Raises:
            CheckpointError: the checkpoint brings none, or a damaged one.
        """
        if self.tokenizer_factory is None:
            raise CheckpointError(
                f"{self.source or 'model'}: no tokenizer came with this checkpoint; set model.tokenizer yourself"
            )
        return self.tokenizer_factory()

    @property
    def nbytes(self) -> int:
        """Bytes that the weights occupy."""
        return sum(weight_nbytes(w) for w in self.weights.values())

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One weight as a float tensor (a copy for low-bit weights)."""
        weight = self.weights[name]
        return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)

    def require_softmax(self, what: str) -> None:
        """Raise a ValueError unless every layer has softmax attention, which ``what`` needs."""
        if self.mixers:
            raise ValueError(
                f"{what}: layer {min(self.mixers)} has linear attention; a model with softmax attention in every layer "
                "is needed (tilewright.linearize saves and loads linearized models, models.engine runs them)"
            )

    @property
    def has_thresholds(self) -> bool:
        """Whether a layer drops neurons below a threshold of the gate activation (CATS)."""
        return any(threshold_name(layer) in self.weights for layer in range(self.config.num_hidden_layers))

    @property
    def output_name(self) -> str:
        """Name of the matrix that maps hidden states to logits."""
        return "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"


def weight_nbytes(weight: Weight) -> int:
    """Stored bytes of one weight, scales included."""
    return weight.numel() * weight.element_size() if isinstance(weight, Tensor) else weight.nbytes


def linear_names(config: LlamaConfig) -> Iterator[str]:
    """Parameter names of all linears of the decoder layers, in execution order (no embedding, no head)."""
    for layer in range(config.num_hidden_layers):
        for linear in LINEARS:
            yield f"model.layers.{layer}.{linear}.weight"


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the architecture with its shape: the complete list that a checkpoint must hold."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    matrices = dict(
        zip(
            LINEARS,
            ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)),
            strict=True,
        )
    )
    biased = dict.fromkeys(LINEARS[:3], config.qkv_bias) | {LINEARS[3]: config.output_bias}
    biased |= dict.fromkeys(LINEARS[4:], config.mlp_bias)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, shape in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if biased[name]:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        if config.has_sub_norms:
            shapes[prefix + "self_attn.attn_sub_norm.weight"] = (q,)
            shapes[prefix + "mlp.ffn_sub_norm.weight"] = (inner,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def optional_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Parameters that a quantizer may add: the post-RoPE key scale S of FireQ (section 4), one row per KV head.

    Keys are multiplied by S and queries by 1/S after the rotation.
    """
    shape = (config.num_key_value_heads, config.head_dim)
    return {f"model.layers.{i}.self_attn.key_scale": shape for i in range(config.num_hidden_layers)}


def threshold_name(layer: int) -> str:
    """Name of a layer's thresholds of the gate activation (CATS), float [1] or one a neuron [M]; optional."""
    return f"model.layers.{layer}.mlp.threshold"


def _check_threshold(name: str, weight: Weight, inner: int, where: str) -> None:
    shape = tuple(weight.shape)
    if shape not in ((1,), (inner,)) or not isinstance(weight, Tensor):
        raise CheckpointError(f"{where}: tensor {name!r} has shape {list(shape)}, [1] or [{inner}] is needed")
    check_finite(name, weight, where)
    if bool((weight < 0).any()):
        raise CheckpointError(f"{where}: tensor {name!r} is negative; thresholds are compared with magnitudes")


def map_widths(config: LlamaConfig) -> dict[str, int]:
    """Where an activation map may sit, and its width there: outputs of modules by transformers' names."""
    hidden, q = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    places = {"model.embed_tokens": hidden}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        places |= dict.fromkeys((f"{prefix}.{part}" for part in HIDDEN_MAPS), hidden)
        places |= {f"{prefix}.self_attn.q_proj": q, f"{prefix}.self_attn.k_proj": kv, f"{prefix}.self_attn.v_proj": kv}
        places[prefix] = hidden
    return places | {"model.norm": hidden}


def check_maps(config: LlamaConfig, maps: dict[str, ActivationMap], where: str) -> None:
    """Raise unless every map sits where a runtime can apply it, is affine, and has the activation's width.

    Raises:
        ValueError: naming the place, with what is there and what is needed.
    """
    places = map_widths(config)
    for name, one in maps.items():
        if name not in places:
            raise ValueError(
                f"{where}: no activation map can sit at {name[:120]!r}; possible are outputs of the embedding, norms, "
                "self_attn, its q_proj, k_proj, v_proj and o_proj, mlp and its down_proj, and whole layers "
                "(keep the model in transformers for other places)"
            )
        if one.low is not None:
            raise ValueError(f"{where}: the map at {name} has a range and is not affine; fit it with support='all'")
        if one.width != places[name]:
            raise ValueError(f"{where}: the map at {name} has {one.width} coordinates, needed {places[name]}")


def check_weights(config: LlamaConfig, weights: dict[str, Weight], where: str) -> None:
    """Raise unless the weights are exactly those of the architecture, with finite values.

    Raises:
        CheckpointError: naming the missing, unknown, misshapen or non-finite tensor.
    """
    expected = expected_shapes(config)
    allowed = expected | optional_shapes(config)
    # counted first: a damaged header may ask for millions of layers, and the message needs only one name
    for name in expected:
        if name not in weights:
            raise CheckpointError(f"{where}: tensor {name!r} is missing")
    thresholds = {threshold_name(layer) for layer in range(config.num_hidden_layers)}
    for name, weight in weights.items():
        if name in thresholds:
            _check_threshold(name, weight, config.intermediate_size, where)
            continue
        if name not in allowed:
            raise CheckpointError(
                f"{where}: tensor {name[:120]!r} does not belong to this {config.model_type} architecture"
            )
        check_shape(name, tuple(weight.shape), allowed[name], where)
        check_finite(name, weight, where)


def check_shape(name: str, got: tuple[int, ...], need: tuple[int, ...], where: str) -> None:
    """Raise a CheckpointError naming tensor, got and need, if the two differ."""
    if got != need:
        raise CheckpointError(f"{where}: tensor {name!r} has shape {list(got)}, the configuration needs {list(need)}")


def check_finite(name: str, weight: Weight, where: str) -> None:
    """Raise a CheckpointError naming the tensor, if a value (or a scale of a low-bit one) is NaN or infinite."""
    if isinstance(weight, Tensor):
        parts = {"": weight}
        if not weight.is_floating_point():
            raise CheckpointError(f"{where}: tensor {name!r} has dtype {weight.dtype}, a floating dtype is needed")
    else:
        parts = {" (scales)": weight.scale if isinstance(weight, PackedTernary) else weight.scales}
        if isinstance(weight, Int4Weight) and weight.offsets is not None and weight.offsets.is_floating_point():
            parts[" (offsets)"] = weight.offsets
    for part, tensor in parts.items():
        if not all_finite(tensor):
            raise CheckpointError(f"{where}: tensor {name!r}{part} holds NaN or infinite values; the file is damaged")


def all_finite(tensor: Tensor) -> bool:
    """True when no element is NaN or infinite: one pass, no temporary of the tensor's size."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
