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

from tilewright.capture.activation_map import ActivationMap
from tilewright.formats import int4_sparse
from tilewright.formats.int4 import Int4Weight
from tilewright.formats.int8 import GROUP as INT8_GROUP
from tilewright.formats.int8 import Int8Weight
from tilewright.formats.ternary import PackedTernary
from tilewright.models.config import LlamaConfig
from tilewright.models.language_model import LanguageModel, Weight, check_maps, threshold_name
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
_SPARSE_MLP = 12
_ACTIVATION_MAP = 13
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
    sparse: bool = True,
) -> ModelImage:
    """Pack a model for the engine.

    INT4, INT8 and ternary weights keep their exact values; float matrices become bfloat16. Inputs of ternary weights
    are rounded to INT8 with one scale a token, whatever ``act``. ``model.maps`` become records.

    Args:
        model: a loaded model; a post-RoPE key scale (``self_attn.key_scale``) is applied while running.
        act: what INT4 linears quantize activations to; "fp8-fold" needs symmetric weights.
        kv: format of the cache.
        query: format of the queries that meet an INT4 cache.
        scale_group: columns of an INT8 activation that share a scale, a multiple of the weights' group; 0 is one scale
            a token. None: 64, or the weights' group where 64 is no multiple of it.
        release: remove each weight from ``model.weights`` once it is packed, so that no second copy is ever held. The
            model cannot be used afterwards.
        sparse: where layers have thresholds of the gate activation (CATS), also keep up and down by rows, so that a
            decoded token reads only those it needs; without, all rows are read. The same bits either way.

    Raises:
        ValueError: an option is none of its words, a shape is outside what the engine runs, or an activation map sits
            where it cannot be applied.
    """
    for name, value, known in (("act", act, _ACTIVATIONS), ("kv", kv, _CACHES), ("query", query, _QUERIES)):
        if value not in known:
            raise ValueError(f"compile: {name} = {value!r}, needed one of {', '.join(map(repr, known))}")
    weights = model.weights if release else dict(model.weights)
    group = activation_scale_group(act, scale_group, weights)
    check_maps(model.config, model.maps, "compile")
    formats = (_ACTIVATIONS[act], group, _CACHES[kv], _QUERIES[query])
    compiler = _Compiler(model.config, weights, *formats, sparse, model.mixers, model.maps)
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
    sparse: bool = True
    mixers: dict[int, LinearMixer] = field(default_factory=dict)
    maps: dict[str, ActivationMap] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    slots: list[tuple[int, int]] = field(default_factory=list)
    records: list[list[int]] = field(default_factory=list)
    parts: list[tuple[int, Tensor]] = field(default_factory=list)
    bytes: int = 0
    mixer_slots: dict[tuple[str, int], int] = field(default_factory=dict)
    mapped: int | None = None

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
        self.inner, self.after_inner = self._slot(layer, c.intermediate_size)

        table = self._matrix("model.embed_tokens.weight")
        self._record(_EMBED, [self.hidden, *table])
        self._map_in_place("model.embed_tokens", self.hidden)
        frequencies = self._floats(c.rope_frequencies())
        self._record(_ANGLES, [self.angles, frequencies, float_bits(c.rotation_gain)])
        for index in range(c.num_hidden_layers):
            self._layer(index)
        source, norm = self._normalized("model.norm")
        head = table if c.tie_word_embeddings else self._matrix("lm_head.weight")
        self._record(_LOGITS, [source, *norm, *self._activation(), *head])
        return self._program(), self._arena()

    def _layer(self, index: int) -> None:
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        source, norm = self._normalized(prefix + "input_layernorm")
        projections = [(attention + "q_proj", self.q), (attention + "k_proj", self.k), (attention + "v_proj", self.v)]
        self._linear(source, norm, projections)
        for name, slot in projections:
            self._map_in_place(name, slot)
        if index in self.mixers:
            self._mixer(self.mixers[index])
        else:
            self._attention(attention)
        if index == self.config.num_hidden_layers - 1:
            self._record(_SELECT_LAST, [2, self.hidden, self.attended])
        self._into_residual(self.attended, attention + "o_proj", self._sub_norm(attention + "attn_sub_norm.weight"))
        source, norm = self._normalized(prefix + "post_attention_layernorm")
        if (threshold := self.weights.pop(threshold_name(index), None)) is not None:
            assert isinstance(threshold, Tensor)
            self._sparse_mlp(source, norm, mlp, threshold)
        else:
            self._gated(source, norm, mlp + "gate_proj", mlp + "up_proj")
            self._into_residual(self.inner, mlp + "down_proj", self._sub_norm(mlp + "ffn_sub_norm.weight"))
        self._map_in_place(prefix.removesuffix("."), self.hidden)

    def _normalized(self, name: str) -> tuple[int, Sequence[int]]:
        """Slot and norm that linears read a norm's output from: the stream, or a slot of its own behind a map."""
        norm = self._norm(name + ".weight")
        if self._steers(name):
            target = self._mapped_slot()
            self._map(name, self.hidden, target, norm)
            return target, _NO_NORM
        return self.hidden, norm

    def _into_residual(self, source: int, name: str, norm: Sequence[int]) -> None:
        """hidden += linear(norm(source)), through the maps at the output of the linear and of the module around it."""
        places = [place for place in (name, name.rpartition(".")[0]) if self._steers(place)]
        if not places:
            self._linear(source, norm, [(name, self.hidden)], add=True)
            return
        target = self._mapped_slot()
        self._linear(source, norm, [(name, target)])
        for place in places[:-1]:
            self._map_in_place(place, target)
        self._map(places[-1], target, self.hidden, add=True)

    def _steers(self, name: str) -> bool:
        return name in self.maps and self.maps[name].strength != 0.0

    def _map_in_place(self, name: str, slot: int) -> None:
        if self._steers(name):
            self._map(name, slot, slot)

    def _map(self, name: str, source: int, target: int, norm: Sequence[int] | None = None, add: bool = False) -> None:
        one = self.maps[name]
        parts = [self._floats(one.weight), self._floats(one.bias), float_bits(one.strength)]
        self._record(_ACTIVATION_MAP, [source, *(_NO_NORM if norm is None else norm), *parts, target, int(add)])

    def _mapped_slot(self) -> int:
        if self.mapped is None:
            # Alive together with the middle of the MLP.
            start = max(self.after_layer, self.after_inner)
            self.mapped, self.after_layer = self._slot(start, self.config.hidden_size)
        return self.mapped

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

    def _sparse_mlp(self, source: int, norm: Sequence[int], mlp: str, threshold: Tensor) -> None:
        if any(self._steers(place) for place in (mlp + "down_proj", mlp.removesuffix("."))):
            where = f"compile: {mlp.removesuffix('.')} has thresholds and a map at its output"
            raise ValueError(f"{where}; put the map at the layer's output")
        if self.config.hidden_act != "silu" or self.config.has_sub_norms:
            raise ValueError(f"compile: {mlp.removesuffix('.')} has thresholds, which go with SiLU and no norm inside")
        names = [mlp + "gate_proj", mlp + "up_proj", mlp + "down_proj"]
        self._one_format(names[0], names[1])
        up, down = self.weights[names[1] + ".weight"], self.weights[names[2] + ".weight"]
        record = [source, *norm, *self._activation(), self.hidden, self.inner, *_NO_NORM, self.inner]
        record += [threshold.numel(), self._floats(threshold)]
        for name in names:
            record += [*self._matrix(name + ".weight"), self._bias(name)]
            if name == names[1]:
                up_blob = record[-3:-1]
        by_rows = self.sparse and self._by_rows(up, down)
        record.append(int(bool(by_rows)))
        if by_rows:
            # A float matrix lies by rows already.
            record += list(up_blob) if by_rows[0] is None else self._part(by_rows[0])
            record += self._part(by_rows[1])
        else:
            self.notes.append(f"{mlp.removesuffix('.')}: all rows are read, its formats are not kept by rows")
        self._record(_SPARSE_MLP, record)

    def _by_rows(self, up: Weight, down: Weight) -> tuple[Tensor | None, Tensor] | None:
        """Blobs of up by rows (None: its own) and of down by columns; None where a format has no such form."""
        int8_tokens = self.act == _ACTIVATIONS["int8"]
        if isinstance(up, Int4Weight):
            if not (int8_tokens and int4_sparse.can_pack_rows(up)):
                return None
            rows: Tensor | None = int4_sparse.pack_rows(up)
        elif isinstance(up, Tensor):
            rows = None
        else:
            return None
        if isinstance(down, Int4Weight):
            return (rows, int4_sparse.pack_columns(down)) if int8_tokens else None
        if isinstance(down, Tensor):
            return rows, dense_linear.bfloat16_pack(down.detach().to(torch.bfloat16).T.contiguous())
        return None

    def _one_format(self, gate: str, up: str) -> None:
        """Gate and up share one quantized input: where their formats differ both are kept in bfloat16."""
        if input_kind(self.weights[gate + ".weight"]) != input_kind(self.weights[up + ".weight"]):
            for name in (gate, up):
                weight = self.weights[name + ".weight"]
                if not isinstance(weight, Tensor):
                    self.weights[name + ".weight"] = weight.dequantize(torch.bfloat16)
                    self.notes.append(f"{name}: kept in bfloat16, since gate and up come in different formats")

    def _gated(self, source: int, norm: Sequence[int], gate: str, up: str) -> None:
        self._one_format(gate, up)
        record = [source, *norm, *self._activation(), self.inner, _FUNCTIONS[self.config.hidden_act]]
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
