# SPDX-License-Identifier: Apache-2.0
"""A whole model in the accelerator's form: made from a transformers module, run on any implementation of the units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract import (
    MAX_CONTEXT,
    Factor,
    KvCache,
    Layer,
    Linear,
    NormConstants,
    StatusRegister,
    Tiling,
    decoder_layer,
    pack_tlmm,
    rope_order,
    rope_table,
)
from tilewright.edge.contract.half import Half
from tilewright.edge.contract.layer import PythonUnits, Units
from tilewright.edge.contract.weights import Int8

GATE_MAPS = {"silu": "silu", "swish": "silu", "relu2": "squared_relu"}


def ternary_of(weight: Any, name: str = "weight") -> tuple[Int8, float]:
    """int8 codes and gamma of a weight `[outputs, inputs]`: kept when it is ternary already, else rounded by its mean.

    Raises:
        ValueError: it has a NaN or an infinity, or is all zeros.
    """
    from tilewright.formats.ternary import quantize_ternary

    w = weight.detach().float().cpu()
    sizes = w.abs()
    largest = float(sizes.max())
    if bool(((sizes == 0) | (sizes == largest)).all()) and largest > 0:
        return w.sign().numpy().astype(np.int8), largest
    try:
        codes, scale = quantize_ternary(w)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return codes.numpy(), float(scale)


@dataclass(frozen=True)
class EdgeModel:
    """Layers for the accelerator, and what the host keeps: embedding and head, float16 `[vocab, width]`."""

    layers: list[Layer]
    embedding: Half
    head: Half
    final_norm: Half
    eps: float
    rope_base: float
    tiling: Tiling

    @classmethod
    def from_transformers(cls, module: Any, tiling: Tiling | None = None) -> EdgeModel:
        """From a LlamaForCausalLM or BitNetForCausalLM (or one of the same structure), linears rounded to ternary.

        Raises:
            ValueError: it has a bias, a scaled RoPE, or a gate that the accelerator does not compute.
        """
        tiling, config = tiling or Tiling(), module.config
        kinds = getattr(config, "rope_parameters", None) or {}
        if kinds.get("rope_type", "default") != "default":
            raise ValueError(f"EdgeModel: rope_type = {kinds['rope_type']!r}, needed 'default'")
        if config.hidden_act not in GATE_MAPS:
            raise ValueError(f"EdgeModel: hidden_act = {config.hidden_act!r}, needed one of {sorted(GATE_MAPS)}")
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        order = rope_order(size)
        layers = [
            _layer(part, f"layers.{i}", config, size, order, tiling) for i, part in enumerate(module.model.layers)
        ]
        embedding, head = _half(module.model.embed_tokens.weight), _half(module.lm_head.weight)
        base = float(kinds.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
        return cls(layers, embedding, head, _half(module.model.norm.weight), float(config.rms_norm_eps), base, tiling)

    def session(self, units: Units | None = None, capacity: int = MAX_CONTEXT) -> Session:
        """An empty context on an implementation of the units; the Python reference when None."""
        return Session(self, units or PythonUnits(), capacity)


def _half(tensor: Any) -> Half:
    return np.asarray(tensor.detach().float().cpu().numpy().astype(np.float16))


def _codes(module: Any, name: str) -> tuple[Int8, float]:
    """Of a linear layer, or of one that keeps a packed ternary weight and hands it out as ``ternary()``."""
    if not hasattr(module, "ternary"):
        return ternary_of(module.weight, name)
    packed = module.ternary()
    if packed.scale.numel() != 1:
        raise ValueError(f"{name}: has {packed.scale.numel()} weight scales, the accelerator applies one a matrix")
    return packed.unpack().numpy(), float(packed.scale)


def _linear(module: Any, name: str, tiling: Tiling, norm: Any = None, order: NDArray[np.int64] | None = None) -> Linear:
    if getattr(module, "bias", None) is not None:
        raise ValueError(f"{name}: has a bias, which the accelerator does not add")
    codes, gamma = _codes(module, name)
    if order is not None:
        codes = np.ascontiguousarray(codes.reshape(-1, len(order), codes.shape[1])[:, order].reshape(codes.shape))
    return Linear(pack_tlmm(codes, tiling), Factor.of(gamma / 127), None if norm is None else _half(norm.weight))


def _layer(part: Any, name: str, config: Any, size: int, order: NDArray[np.int64], tiling: Tiling) -> Layer:
    attention, mlp = part.self_attn, part.mlp

    def linear(module: Any, what: str, norm: Any = None, rows: NDArray[np.int64] | None = None) -> Linear:
        return _linear(module, f"{name}.{what}", tiling, norm, rows)

    return Layer(
        q=linear(attention.q_proj, "q_proj", part.input_layernorm, order),
        k=linear(attention.k_proj, "k_proj", None, order),
        v=linear(attention.v_proj, "v_proj"),
        o=linear(attention.o_proj, "o_proj", getattr(attention, "attn_sub_norm", None)),
        gate=linear(mlp.gate_proj, "gate_proj", part.post_attention_layernorm),
        up=linear(mlp.up_proj, "up_proj"),
        down=linear(mlp.down_proj, "down_proj", getattr(mlp, "ffn_sub_norm", None)),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=size,
        eps=float(config.rms_norm_eps),
        gate_map=GATE_MAPS[config.hidden_act],
    )


class Context:
    """A context of tokens that grows: what every implementation of the layers shares.

    Attributes:
        status: sticky bits of all that was computed.
        capacity: tokens that fit.
        angles: int16 `[capacity, head_size / 2, 2]`, of :func:`tilewright.edge.contract.rope_table`.
    """

    def __init__(self, model: EdgeModel, units: Units, capacity: int) -> None:
        if not 1 <= capacity <= MAX_CONTEXT:
            raise ValueError(f"session: capacity = {capacity}, needed 1 to {MAX_CONTEXT}")
        self.model, self.units, self.capacity = model, units, capacity
        self.angles = rope_table(capacity, model.layers[0].head_size, model.rope_base)
        self.status = StatusRegister()

    def through_layers(self, x: Half, progress: Callable[[int], None]) -> Half:
        """float16 `[tokens, width]` of new tokens through all layers; they are appended to the context."""
        raise NotImplementedError

    def hidden(self, tokens: Sequence[int], progress: Callable[[int], None] = lambda _: None) -> Half:
        """Append tokens; float16 `[tokens, width]` behind the final norm. ``progress`` is called after each layer."""
        ids = np.asarray(tokens, np.int64)
        vocab = len(self.model.embedding)
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"hidden: tokens of shape {ids.shape}, needed a non-empty list of ids below {vocab}")
        x = self.through_layers(self.model.embedding[ids], progress)
        constants = NormConstants.of(x.shape[1], self.model.eps)
        return self.units.rms_max(x, self.model.final_norm, constants, status=self.status)[0]

    def logits(self, hidden: Half) -> NDArray[np.float32]:
        """float32 `[tokens, vocab]`: the head is the host's, the same for every implementation of the units."""
        return hidden.astype(np.float32) @ self.model.head.astype(np.float32).T

    def generate(
        self,
        prompt: Sequence[int],
        count: int,
        progress: Callable[[int], None] = lambda _: None,
        layer: Callable[[int], None] = lambda _: None,
    ) -> list[int]:
        """The ``count`` likeliest tokens, one by one, behind a prompt.

        ``progress`` is called with how many there are after each, ``layer`` as :meth:`hidden` calls its ``progress``.
        """
        found: list[int] = []
        tokens = list(prompt)
        for _ in range(count):
            # The last token generated is not fed back: nothing follows it.
            found.append(int(self.logits(self.hidden(tokens, layer)[-1:])[0].argmax()))
            tokens = found[-1:]
            progress(len(found))
        return found


class Session(Context):
    """A context on an implementation of the units.

    Attributes:
        caches: of each layer.
    """

    def __init__(self, model: EdgeModel, units: Units, capacity: int) -> None:
        super().__init__(model, units, capacity)
        self.caches = [KvCache.empty(capacity, layer.kv_heads, layer.head_size) for layer in model.layers]

    def through_layers(self, x: Half, progress: Callable[[int], None]) -> Half:
        for index, (layer, cache) in enumerate(zip(self.model.layers, self.caches, strict=True)):
            x = decoder_layer(x, layer, cache, self.angles, self.units, self.status)
            progress(index)
        return x
