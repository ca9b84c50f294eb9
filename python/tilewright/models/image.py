# SPDX-License-Identifier: Apache-2.0
"""A model compiled for the decode engine: a program of records over one arena of weights (csrc/engine)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tilewright.formats.int4 import Int4Weight
from tilewright.formats.int8 import GROUP as INT8_GROUP
from tilewright.formats.int8 import Int8Weight
from tilewright.formats.ternary import PackedTernary
from tilewright.models.config import LlamaConfig
from tilewright.models.language_model import LanguageModel, Weight
from tilewright.models.mixer_records import ABSENT, MixerRecords, float_bits
from tilewright.models.mixers import LinearMixer
from tilewright.ops import dense_linear
from tilewright.ops import engine as ops

Activation = Literal["int8", "fp8", "fp8-fold"]
CacheFormat = Literal["int4", "bf16"]
QueryFormat = Literal["fp8", "float32"]

# csrc/engine/program.h and step.h
_MAGIC, _VERSION = 0x454E49474E455754, 2
_HEADER_WORDS, _CHECKSUM_AT = 8, 3
_EMBED, _ANGLES, _LINEAR, _GATED_LINEAR, _ATTENTION, _SELECT_LAST, _LOGITS = range(1, 8)
_NO_WINDOW = 1 << 62
_CACHE_LINE = 64
_FUNCTIONS = {"silu": 0, "relu2": 1}
_ACTIVATIONS = {"int8": 0, "fp8": 1, "fp8-fold": 2}
_CACHES = {"int4": 0, "bf16": 1}
_FLOAT32_SCALES = 2
_QUERIES = {"fp8": 0, "float32": 1}
# Columns of an INT8 activation that share a scale. One scale a token costs 3 % of perplexity on SmolLM2, 64 columns
# cost nothing measurable.
_INT8_SCALE_GROUP = 64
_SLOT_MULTIPLE = 16


@dataclass(frozen=True)
class ModelImage:
    """What the engine runs.

    Attributes:
        program: int64 words, checked by the engine at every call.
        weights: one uint8 arena that the program refers to.
        config: the model's architecture.
        act, kv, query: formats of activations, KV cache and queries.
        scale_group: columns of an INT8 activation that share a scale; 0 is one scale a token.
        notes: what was stored differently from the checkpoint.
        recurrent_layers: how many layers sum their tokens up in a state; a sequence cannot be cut back then.
    """

    program: Tensor
    weights: Tensor
    config: LlamaConfig
    act: Activation
    kv: CacheFormat
    query: QueryFormat
    scale_group: int
    notes: tuple[str, ...] = ()
    recurrent_layers: int = 0

    @property
    def has_constant_state(self) -> bool:
        """Whether no layer keeps all tokens, so that memory does not grow with a sequence."""
        return self.recurrent_layers == self.config.num_hidden_layers

    @property
    def nbytes(self) -> int:
        """Bytes of the arena, all weights included."""
        return self.weights.numel()


def compile(
    model: LanguageModel,
    act: Activation = "int8",
    kv: CacheFormat = "int4",
    query: QueryFormat = "fp8",
    *,
    scale_group: int | None = None,
    release: bool = False,
) -> ModelImage:
    """Pack a model for the engine.

    INT4, INT8 and ternary weights keep their exact values; float matrices become bfloat16. Inputs of ternary weights
    are rounded to INT8 with one scale a token, whatever ``act``.

    Args:
        model: a loaded model; a post-RoPE key scale (``self_attn.key_scale``) is applied while running.
        act: what INT4 linears quantize activations to; "fp8-fold" needs symmetric weights.
        kv: format of the cache.
        query: format of the queries that meet an INT4 cache.
        scale_group: columns of an INT8 activation that share a scale, a multiple of the weights' group; 0 is one scale
            a token. None: 64, or the weights' group where 64 is no multiple of it.
        release: remove each weight from ``model.weights`` once it is packed, so that no second copy is ever held. The
            model cannot be used afterwards.

    Raises:
        ValueError: an option is none of its words, or a shape is outside what the engine runs.
    """
    for name, value, known in (("act", act, _ACTIVATIONS), ("kv", kv, _CACHES), ("query", query, _QUERIES)):
        if value not in known:
            raise ValueError(f"compile: {name} = {value!r}, needed one of {', '.join(map(repr, known))}")
    weights = model.weights if release else dict(model.weights)
    group = activation_scale_group(act, scale_group, weights)
    compiler = _Compiler(model.config, weights, _ACTIVATIONS[act], group, _CACHES[kv], _QUERIES[query], model.mixers)
    program, arena = compiler.compile()
    notes = tuple(compiler.notes)
    return ModelImage(program, arena, model.config, act, kv, query, group, notes, len(model.mixers))


def activation_scale_group(act: Activation, wanted: int | None, weights: dict[str, Weight]) -> int:
    """Columns of an INT8 activation that share a scale (0: all of a token), as :func:`compile` decides."""
    if act != "int8":
        if wanted:
            raise ValueError(
                f"compile: scale_group = {wanted} with act = {act!r}; FP8 activations have one scale a token"
            )
        return 0
    groups = {w.group_size for w in weights.values() if isinstance(w, Int4Weight)}
    if wanted is None:
        return math.lcm(_INT8_SCALE_GROUP, *groups) if groups else 0
    if wanted < 0 or any(wanted % group for group in groups):
        raise ValueError(
            f"compile: scale_group = {wanted}, needed 0 or a multiple of the weights' groups {sorted(groups)}"
        )
    return wanted


@dataclass
class _Compiler:
    config: LlamaConfig
    weights: dict[str, Weight]
    act: int
    scale_group: int
    kv: int
    query: int
    mixers: dict[int, LinearMixer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    slots: list[tuple[int, int]] = field(default_factory=list)
    records: list[list[int]] = field(default_factory=list)
    parts: list[tuple[int, Tensor]] = field(default_factory=list)
    bytes: int = 0
    mixer_slots: dict[tuple[str, int], int] = field(default_factory=dict)

    def compile(self) -> tuple[Tensor, Tensor]:
        c = self.config
        q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.hidden, after = self._slot(0, c.hidden_size)
        self.angles, layer = self._slot(after, c.head_dim)
        self.q, after = self._slot(layer, q_width)
        self.k, after = self._slot(after, kv_width)
        self.v, after = self._slot(after, kv_width)
        self.attended, self.after_layer = self._slot(after, q_width)
        # The MLP starts when a layer's attention is over.
        self.inner, _ = self._slot(layer, c.intermediate_size)

        table = self._matrix("model.embed_tokens.weight")
        self._record(_EMBED, [self.hidden, *table])
        frequencies = self._floats(c.rope_frequencies())
        self._record(_ANGLES, [self.angles, frequencies, float_bits(c.rotation_gain)])
        for index in range(c.num_hidden_layers):
            self._layer(index)
        norm = self._norm("model.norm.weight")
        head = table if c.tie_word_embeddings else self._matrix("lm_head.weight")
        self._record(_LOGITS, [self.hidden, *norm, *self._activation(), *head])
        return self._program(), self._arena()

    def _layer(self, index: int) -> None:
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        norm = self._norm(prefix + "input_layernorm.weight")
        projections = [(attention + "q_proj", self.q), (attention + "k_proj", self.k), (attention + "v_proj", self.v)]
        self._linear(self.hidden, norm, projections)
        if index in self.mixers:
            self._mixer(self.mixers[index])
        else:
            self._attention(attention)
        if index == self.config.num_hidden_layers - 1:
            self._record(_SELECT_LAST, [2, self.hidden, self.attended])
        sub_norm = self._sub_norm(attention + "attn_sub_norm.weight")
        self._linear(self.attended, sub_norm, [(attention + "o_proj", self.hidden)], add=True)
        norm = self._norm(prefix + "post_attention_layernorm.weight")
        self._gated(norm, mlp + "gate_proj", mlp + "up_proj")
        sub_norm = self._sub_norm(mlp + "ffn_sub_norm.weight")
        self._linear(self.inner, sub_norm, [(mlp + "down_proj", self.hidden)], add=True)

    def _linear(self, source: int, norm: Sequence[int], outputs: list[tuple[str, int]], add: bool = False) -> None:
        # Matrices that read the same quantized input share a record; a checkpoint may mix formats within a layer.
        kinds: dict[tuple[object, ...], list[tuple[str, int]]] = {}
        for name, target in outputs:
            kinds.setdefault(input_kind(self.weights[name + ".weight"]), []).append((name, target))
        for members in kinds.values():
            record = [source, *norm, *self._activation(), len(members)]
            for name, target in members:
                record += [target, int(add), *self._matrix(name + ".weight"), self._bias(name)]
            self._record(_LINEAR, record)

    def _gated(self, norm: Sequence[int], gate: str, up: str) -> None:
        if input_kind(self.weights[gate + ".weight"]) != input_kind(self.weights[up + ".weight"]):
            for name in (gate, up):
                weight = self.weights[name + ".weight"]
                if not isinstance(weight, Tensor):
                    self.weights[name + ".weight"] = weight.dequantize(torch.bfloat16)
                    self.notes.append(f"{name}: kept in bfloat16, since gate and up come in different formats")
        record = [self.hidden, *norm, *self._activation(), self.inner, _FUNCTIONS[self.config.hidden_act]]
        for name in (gate, up):
            record += [*self._matrix(name + ".weight"), self._bias(name)]
        self._record(_GATED_LINEAR, record)

    def _attention(self, prefix: str) -> None:
        c = self.config
        scales = self.weights.pop(prefix + "key_scale", None)
        key_scale = query_scale = ABSENT
        if scales is not None:
            assert isinstance(scales, Tensor)
            key_scale, query_scale = self._floats(scales), self._floats(1.0 / scales.to(torch.float32))
        window = _NO_WINDOW if c.sliding_window is None else c.sliding_window
        shape = [c.num_attention_heads, c.num_key_value_heads, c.head_dim]
        slots = [self.q, self.k, self.v, self.attended, self.angles]
        formats = [self.kv, _FLOAT32_SCALES, self.query]
        self._record(
            _ATTENTION, [*shape, *slots, *formats, float_bits(c.head_dim**-0.5), window, key_scale, query_scale]
        )

    def _mixer(self, mixer: LinearMixer) -> None:
        c = self.config
        records = MixerRecords(
            mixer, c.num_attention_heads, c.num_key_value_heads, c.head_dim, self._take, self._floats
        )
        slots = {"q": self.q, "k": self.k, "v": self.v, "attended": self.attended, "angles": self.angles}
        for name, width in records.slots.items():
            # Layers of one shape share their slots.
            if (name, width) not in self.mixer_slots:
                self.mixer_slots[name, width], self.after_layer = self._slot(self.after_layer, width)
            slots[name] = self.mixer_slots[name, width]
        for kind, arguments in records.records(slots):
            self._record(kind, arguments)

    def _activation(self) -> tuple[int, int]:
        return self.act, self.scale_group

    def _norm(self, name: str) -> tuple[int, int]:
        return self._floats(self._take(name)), float_bits(self.config.rms_norm_eps)

    def _sub_norm(self, name: str) -> tuple[int, int]:
        return self._norm(name) if self.config.has_sub_norms else _NO_NORM

    def _bias(self, name: str) -> int:
        bias = self.weights.pop(name + ".bias", None)
        if bias is None:
            return ABSENT
        assert isinstance(bias, Tensor)
        return self._floats(bias)

    def _take(self, name: str) -> Tensor:
        weight = self.weights.pop(name)
        assert isinstance(weight, Tensor)
        return weight

    def _floats(self, values: Tensor) -> int:
        return self._part(values.detach().to(torch.float32).flatten().contiguous().view(torch.uint8))[0]

    def _matrix(self, name: str) -> tuple[int, int]:
        weight = self.weights.pop(name)
        if isinstance(weight, Int4Weight):
            return self._part(weight.pack().data)
        if isinstance(weight, Int8Weight):
            return self._part(dense_linear.int8_pack(weight))
        if isinstance(weight, PackedTernary):
            return self._part(_ternary_part(weight))
        if weight.dtype != torch.bfloat16:
            self.notes.append(f"{name}: {str(weight.dtype).removeprefix('torch.')} kept in bfloat16")
        return self._part(dense_linear.bfloat16_pack(weight.detach().to(torch.bfloat16)))

    def _part(self, blob: Tensor) -> tuple[int, int]:
        offset = self.bytes
        self.parts.append((offset, blob))
        self.bytes += -(-blob.numel() // _CACHE_LINE) * _CACHE_LINE
        return offset, blob.numel()

    def _slot(self, offset: int, width: int) -> tuple[int, int]:
        self.slots.append((offset, width))
        return len(self.slots) - 1, offset + -(-width // _SLOT_MULTIPLE) * _SLOT_MULTIPLE

    def _record(self, kind: int, arguments: Sequence[int]) -> None:
        self.records.append([kind, len(arguments), *arguments])

    def _program(self) -> Tensor:
        body = [word for slot in self.slots for word in slot] + [word for record in self.records for word in record]
        header = [_MAGIC, _VERSION, _HEADER_WORDS + len(body), 0, self.bytes]
        header += [len(self.slots), len(self.records), self.config.vocab_size]
        return seal(torch.tensor(header + body, dtype=torch.int64))

    def _arena(self) -> Tensor:
        arena = ops.engine_arena(self.bytes)
        end = 0
        self.parts.reverse()
        while self.parts:
            offset, blob = self.parts.pop()
            arena[end:offset] = 0
            end = offset + blob.numel()
            arena[offset:end] = blob
            del blob
        arena[end:] = 0
        _return_freed_memory()
        return arena


_NO_NORM = (ABSENT, float_bits(0.0))


def seal(program: Tensor) -> Tensor:
    """Write the checksum into a program's header, in place, and return the program."""
    program[_CHECKSUM_AT] = ops.engine_checksum(program)
    return program


def input_kind(weight: Weight) -> tuple[object, ...]:
    """Matrices of one kind read the same quantized input."""
    if isinstance(weight, Int4Weight):
        return ("int4", weight.group_size)
    if isinstance(weight, PackedTernary):
        return ("ternary",)
    return ("int8", INT8_GROUP) if isinstance(weight, Int8Weight) else ("bfloat16",)


def _ternary_part(weight: PackedTernary) -> Tensor:
    """A weight packed as "q2", and its scales at the next multiple of a cache line."""
    data = weight.convert("q2").data
    padding = data.new_zeros(-data.numel() % _CACHE_LINE)
    return torch.cat((data, padding, weight.scale.to(torch.float32).contiguous().view(torch.uint8)))


def _return_freed_memory() -> None:
    """Hand the allocator's free pages back to the system, where it can: packing frees as much as it keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
