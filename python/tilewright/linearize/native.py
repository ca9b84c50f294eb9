# SPDX-License-Identifier: Apache-2.0
"""Linearized models on the native decode engine: the same function, one operator call a token, memory that is constant.

:func:`to_language_model` turns a converted transformers model into what :class:`tilewright.models.engine.Engine` runs.
Matrices become bfloat16 there (or what a quantizer makes of them), everything between them is float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilewright.linearize.checkpoint import LinearizedModel
from tilewright.linearize.conversion import converted_layers, linearization
from tilewright.models import LanguageModel, LlamaConfig
from tilewright.models.language_model import Weight, check_weights
from tilewright.models.mixers import HeadFunction, HeadMap, LinearMixer, Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Described = tuple[LinearMixer, dict[str, Tensor]]
_ACTIVATIONS: dict[str, HeadFunction] = {
    "softmax_dim": "softmax_pair",
    "exp_dim": "exp_pair",
    "exp": "capped_exp_pair",
    "joint_softmax": "joint_softmax",
}
# What float32 inputs are held within before "exp" (tilewright.nn.hedgehog.feature_maps.CAP).
_EXP_CAP = 15.0
# In place of a maximum with it, under a sum of probabilities.
_EPS = 1e-12


class NoNativeForm(ValueError):
    """The engine has no kernels for the way in which a model is linearized."""


def to_language_model(model: PreTrainedModel | LinearizedModel) -> LanguageModel:
    """What the decode engine needs of a linearized model; weights are shared with it where they can be.

    Raises:
        ValueError: the model is not linearized.
        NoNativeForm: it is, in a way that the engine has no kernels for; the message says which.
        CheckpointError: an architecture that the engine does not run.
    """
    loaded = model if isinstance(model, LinearizedModel) else LinearizedModel(model)
    model = loaded.model
    done = linearization(model)
    if done is None:
        raise ValueError(f"{type(model).__name__} is not linearized; tilewright.models.load() gives others")
    if done.method not in _DESCRIBE:
        raise NoNativeForm(f"method {done.method!r} has no native form; known are {', '.join(_DESCRIBE)}")
    config = LlamaConfig.from_transformers(model.config.to_dict())
    weights: dict[str, Weight] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    mixers = {}
    for index, attention in converted_layers(model).items():
        prefix = f"model.layers.{index}.self_attn."
        mixer, tensors = _DESCRIBE[done.method](attention)
        mixers[index] = _renamed(mixer, prefix)
        for name in [name for name in weights if name.startswith(prefix) and "_proj." not in name]:
            del weights[name]
        weights |= {prefix + name: tensor.detach() for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    own = {name for mixer in mixers.values() for name in mixer.tensors}
    check_weights(
        config, {name: weight for name, weight in weights.items() if name not in own}, loaded.source or "model"
    )
    return LanguageModel(
        config, weights, source=loaded.source, tokenizer_factory=loaded.tokenizer_factory, mixers=mixers
    )


def _renamed(mixer: LinearMixer, prefix: str) -> LinearMixer:
    """The same with full names of parameters."""

    def full(spec: HeadMap) -> HeadMap:
        names = {field: prefix + name for field in ("weight", "bias") if (name := getattr(spec, field)) is not None}
        return dataclasses.replace(spec, **names)

    gate, window = mixer.gate, mixer.window
    if window is not None and window.mix is not None:
        window = dataclasses.replace(window, mix=prefix + window.mix)
    return dataclasses.replace(
        mixer, query=full(mixer.query), key=full(mixer.key), gate=None if gate is None else full(gate), window=window
    )


def _liger(attention: Any) -> Described:
    """o = alpha y_recurrent + beta y_window, gates from the key (tilewright.linearize.liger)."""
    config = attention.liger
    if config.variant == "gsa":
        raise NoNativeForm("Liger's variant 'gsa' (gated slot attention) has no native form; 'gla' and 'hgrn2' have")
    logits = _gate_matrix(attention)
    weight = None if logits is None else "gate.weight"
    hgrn2 = config.variant == "hgrn2"
    factor = 1.0 if hgrn2 else 1.0 / config.gate_logit_normalizer
    mixer = LinearMixer(
        query=HeadMap("softmax"),
        key=HeadMap("complement", weight) if hgrn2 else HeadMap("softmax"),
        gate=None if config.gate == "none" else HeadMap("log_sigmoid", weight, factor=factor),
        normalize=config.normalize,
        eps=_EPS if config.normalize else 0.0,
        # A branch without weight in the sum is kept as short as it can be.
        window=Window(config.window_size if config.beta else 1, None, config.alpha, config.beta),
    )
    return mixer, {} if logits is None else {"gate.weight": logits}


def _gate_matrix(attention: Any) -> Tensor | None:
    """W [heads or 1, D, D] of gate logits W^T k, float32; None: the key itself."""
    config, size = attention.liger, attention.head_dim
    matrix = attention.get_buffer("gate_matrix").float() if config.gate == "random" else None
    if isinstance(config.pool, str):
        return matrix
    # Means over equal groups of channels, each repeated for its group.
    group = size // config.pool
    channel = torch.arange(size) // group
    pool = (channel[:, None] == channel).float()[None] / group
    return pool if matrix is None else matrix @ pool


def _hedgehog(attention: Any) -> Described:
    """Weights phi_q(q) . phi_k(k) after the rotation, softmax in a window (tilewright.linearize.hedgehog)."""
    config, features = attention.hedgehog, attention.features
    if config.feature_map == "performer":
        raise NoNativeForm("feature_map 'performer' has no native form; 'hedgehog', 'elu' and 'relu' have")
    key_heads = attention.num_heads if config.key_maps == "query_heads" else attention.num_key_value_heads
    query, tensors = _feature_map(config, "phi_q", features.phi_q, attention.num_heads)
    key, more = _feature_map(config, "phi_k", features.phi_k, key_heads)
    tensors |= more
    window = None
    if config.window_size is not None:
        tensors["features.mix"] = features.mix.float()
        window = Window(config.window_size, mix="features.mix")
    return LinearMixer(query, key, after_rotation=True, normalize=True, eps=_EPS, window=window), tensors


def _feature_map(config: Any, name: str, module: Any, heads: int) -> tuple[HeadMap, dict[str, Tensor]]:
    if config.feature_map != "hedgehog":
        return HeadMap(config.feature_map, heads=heads), {}
    prefix = f"features.{name}."
    tensors = {prefix + part: tensor for part, tensor in module.named_parameters()}
    bias = prefix + "bias" if module.bias is not None else None
    cap = _EXP_CAP if config.activation == "exp" else 0.0
    return HeadMap(_ACTIVATIONS[config.activation], prefix + "weight", bias, heads, cap=cap), tensors


_DESCRIBE: dict[str, Callable[[Any], Described]] = {"liger": _liger, "hedgehog": _hedgehog}
