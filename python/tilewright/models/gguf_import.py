# SPDX-License-Identifier: Apache-2.0
"""GGUF models of the Llama family, imported exactly: codes, scales and minima stay what the file holds.

Q4_0 becomes a symmetric Int4Weight, Q4_1 one with minima, Q8_0 an Int8Weight; TQ1_0, TQ2_0 and bitnet.cpp's I2_S become
ternary weights where one scale a row can express them; F32, F16 and BF16 keep their dtype; other ggml types are
dequantized to float32 with a note. Llama files store the rows of
Q and K for interleaved rotary pairs; they are put back in half-split order as rows of codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewright.formats.int4 import Int4Weight
from tilewright.formats.int8 import Int8Weight
from tilewright.formats.ternary import PackedTernary, TernaryFormat, wrap_ternary
from tilewright.models.config import LlamaConfig
from tilewright.models.errors import CheckpointError
from tilewright.models.gguf_file import I2_S, I2_S_TAIL, GGUFHeader, TensorRecord, read_header
from tilewright.models.language_model import (
    LanguageModel,
    Weight,
    check_finite,
    check_shape,
    expected_shapes,
    linear_names,
)
from tilewright.models.rope import RopeScaling, rope_from_factors

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "bitnet": "bitnet",
    "bitnet-25": "bitnet",
    "bitnet-b1.58": "bitnet",
}
# bitnet.cpp names the models with a squared ReLU apart; no key says it.
_SQUARED_RELU = ("bitnet-25", "bitnet-b1.58")
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_FACTORS = "rope_freqs.weight"
# Keys of the architecture's namespace that are read, or that may only have the neutral value given.
_READ_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "rope.scale_linear",
    "vocab_size",
}
_NEUTRAL_KEYS = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "tensor_data_layout": "Meta AI original pth",
}
_BLOCK = 32


def load_gguf(path: Path) -> LanguageModel:
    """Load a single-file GGUF model.

    Raises:
        CheckpointError: the file is damaged, of an unsupported architecture, split, or incomplete.
    """
    header = read_header(path)
    config = _config(header)
    expected = expected_shapes(config)
    renamed = _renamed_tensors(header, config, expected)
    for name in expected:
        if name not in renamed:
            raise CheckpointError(f"{path.name}: tensor {name!r} is missing (under its GGUF name)")
    notes: list[str] = []
    weights: dict[str, Weight] = {}
    linears = frozenset(linear_names(config))
    for name, need in expected.items():
        record = renamed[name]
        check_shape(record.name, record.shape, need, path.name)
        weights[name] = _read_weight(header, record, _row_order(name, config, header), name in linears, notes)
        weights[name] = _rescaled(header, renamed.get(name + "_scale"), record, weights[name])
        check_finite(record.name, weights[name], path.name)
    _check_vocabulary(header, config)
    from tilewright.models.tokenizer import gguf_tokenizer

    metadata = header.metadata
    return LanguageModel(
        config, weights, notes=notes, source=path.name, tokenizer_factory=lambda: gguf_tokenizer(metadata, path)
    )


def _config(header: GGUFHeader) -> LlamaConfig:
    file, metadata = header.path.name, header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{file}: general.architecture={str(architecture)[:60]!r} is not supported; supported are "
            f"{', '.join(_ARCHITECTURES)} (Llama, SmolLM2, TinyLlama, Mistral 7B, Qwen2/2.5 and BitNet b1.58 files "
            "are of these)"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{file}: is one of {metadata['split.count']} parts; join them with llama-gguf-split --merge first"
        )
    _check_keys(metadata, architecture, file)
    if metadata.get("general.type", "model") != "model":
        raise CheckpointError(
            f"{file}: general.type={str(metadata['general.type'])[:60]!r}; a model is needed, not an adapter or "
            "projector"
        )

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{architecture}.{key}", default)
        if found is None:
            raise CheckpointError(f"{file}: key '{architecture}.{key}' is missing")
        return found

    heads = value("attention.head_count")
    width = value("embedding_length")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        raise CheckpointError(
            f"{file}: head_count={str(heads)[:60]} and embedding_length={str(width)[:60]} must be positive whole "
            "numbers"
        )
    head_dim = value("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if value(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{file}: {key}={value(key)} differs from the head size {head_dim}, which is not supported"
            )
    theta = value("rope.freq_base", 10000.0)
    window = value("attention.sliding_window", 0)
    biased = "blk.0.attn_q.bias" in header.tensors
    try:
        return LlamaConfig(
            model_type="mistral" if window and architecture == "llama" else _ARCHITECTURES[architecture],
            vocab_size=_vocab_size(header),
            hidden_size=width,
            intermediate_size=value("feed_forward_length"),
            num_hidden_layers=value("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=value("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=value("context_length"),
            rms_norm_eps=_shortest(value("attention.layer_norm_rms_epsilon")),
            rope_theta=_shortest(theta),
            rope_scaling=_rope_scaling(header, architecture, theta, head_dim),
            tie_word_embeddings="output.weight" not in header.tensors,
            qkv_bias=biased,
            output_bias="blk.0.attn_output.bias" in header.tensors,
            mlp_bias="blk.0.ffn_up.bias" in header.tensors,
            sliding_window=window or None,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=_end_tokens(metadata),
            pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
            hidden_act="relu2" if architecture in _SQUARED_RELU else "silu",
        )
    except CheckpointError as wrong:
        raise CheckpointError(f"{file}: {wrong}") from None
    except (TypeError, ValueError, OverflowError) as wrong:
        raise CheckpointError(f"{file}: a value of the header is of the wrong kind: {wrong}") from None


def _shortest(value: Any) -> Any:
    """The decimal number whose float32 form the file holds: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _end_tokens(metadata: dict[str, Any]) -> tuple[Any, ...]:
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _vocab_size(header: GGUFHeader) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{header.path.name}: tensor 'token_embd.weight' is missing")
    return embedding.shape[0]


def _check_vocabulary(header: GGUFHeader, config: LlamaConfig) -> None:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens) != config.vocab_size:
        raise CheckpointError(
            f"{header.path.name}: the vocabulary has {len(tokens)} tokens, the embedding {config.vocab_size} rows"
        )
    stated = header.metadata.get(f"{header.metadata['general.architecture']}.vocab_size", config.vocab_size)
    if stated != config.vocab_size:
        raise CheckpointError(
            f"{header.path.name}: vocab_size={stated} contradicts the embedding's {config.vocab_size} rows"
        )


def _check_keys(metadata: dict[str, Any], architecture: str, file: str) -> None:
    """Refuse hyperparameters that are not understood: one that is ignored changes the model silently."""
    prefix = architecture + "."
    for key, value in metadata.items():
        if key.startswith(prefix):
            name = key[len(prefix) :]
            if name in _NEUTRAL_KEYS and value != _NEUTRAL_KEYS[name]:
                raise CheckpointError(
                    f"{file}: {key}={str(value)[:60]!r} is not supported, only {_NEUTRAL_KEYS[name]!r} is"
                )
            if name not in _READ_KEYS and name not in _NEUTRAL_KEYS:
                raise CheckpointError(
                    f"{file}: key {key!r} is not a hyperparameter that tilewright knows; it may change the model"
                )
        elif key.partition(".")[2] in _READ_KEYS:
            raise CheckpointError(
                f"{file}: key {key!r} is a hyperparameter outside the file's architecture {architecture!r}"
            )


def _rope_scaling(header: GGUFHeader, architecture: str, theta: float, head_dim: int) -> RopeScaling | None:
    metadata, prefix = header.metadata, f"{architecture}.rope."
    kind = metadata.get(prefix + "scaling.type", "none")
    factor = metadata.get(prefix + "scaling.factor", metadata.get(prefix + "scale_linear", 1.0))
    record = header.tensors.get(_ROPE_FACTORS)
    if record is not None:
        if record.type_name != "F32" or record.shape != (head_dim // 2,) or kind not in ("none", "llama3"):
            raise CheckpointError(
                f"{header.path.name}: {_ROPE_FACTORS} is {record.type_name} {list(record.shape)} with scaling "
                f"{kind!r}; "
                f"F32 [{head_dim // 2}] without another scaling is needed"
            )
        divisors = header.read(record).view("<f4").reshape(-1)
        if not np.isfinite(divisors).all():
            raise CheckpointError(f"{header.path.name}: tensor {_ROPE_FACTORS!r} holds NaN or infinite values")
        return rope_from_factors(tuple(float(f) for f in divisors), theta, head_dim)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        if kind == "none" and factor not in (1.0, 0.0):
            return RopeScaling("linear", factor=_shortest(factor))
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=_shortest(factor))
    if kind == "yarn":
        context = metadata.get(prefix + "scaling.original_context_length")
        rule = RopeScaling("yarn", factor=_shortest(factor), original_max_position_embeddings=context)
        gain = metadata.get(prefix + "scaling.attn_factor", 1.0)
        return (
            rule
            if gain == 1.0
            else RopeScaling(
                "yarn",
                factor=rule.factor,
                original_max_position_embeddings=context,
                attention_factor=gain * rule.rotation_gain,
            )
        )
    raise CheckpointError(
        f"{header.path.name}: rope.scaling.type={str(kind)[:60]!r} is not supported; none, linear and yarn are"
    )


def _renamed_tensors(header: GGUFHeader, config: LlamaConfig, expected: Container[str]) -> dict[str, TensorRecord]:
    """GGUF's tensors under transformers' names; a name outside the architecture is an error."""
    renamed = {}
    for name, record in header.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        stem, _, leaf = name.rpartition(".")
        target = _OUTER_NAMES.get(stem)
        if target is None and stem.startswith("blk."):
            layer, _, part = stem[4:].partition(".")
            if part in _LAYER_NAMES and layer.isdecimal() and layer == str(int(layer)):
                target = f"model.layers.{layer}.{_LAYER_NAMES[part]}"
        if leaf == "scale" and f"{target}.weight" in expected:
            leaf = "weight_scale"
        elif f"{target}.{leaf}" not in expected:
            raise CheckpointError(
                f"{header.path.name}: tensor {name[:120]!r} does not belong to the {config.model_type} architecture"
            )
        renamed[f"{target}.{leaf}"] = record
    return renamed


def _row_order(name: str, config: LlamaConfig, header: GGUFHeader) -> np.ndarray[Any, Any] | None:
    """For Q and K of the llama architecture: the file's row behind each half-split row."""
    if header.metadata["general.architecture"] != "llama":
        return None
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return None
    rows = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
    return rows.transpose(0, 2, 1).reshape(-1)


def _read_weight(
    header: GGUFHeader, record: TensorRecord, order: np.ndarray[Any, Any] | None, linear: bool, notes: list[str]
) -> Weight:
    if record.type_name == I2_S:
        return _i2_s(header, record, order, linear)
    exact = record.type_name in _PLAIN or (record.type_name in _LOW_BIT and len(record.shape) == 2)
    if len(record.shape) == 1 and not exact:
        raise CheckpointError(
            f"{header.path.name}: tensor {record.name!r} is a vector of type {record.type_name}; F32, F16 or "
            "BF16 is needed"
        )
    data = header.read(record)
    if order is not None:
        data = data.reshape(len(order), -1)[order]
    if linear and record.type_name in _TERNARY:
        try:
            return wrap_ternary(
                torch.from_numpy(np.ascontiguousarray(data)), _matrix_shape(record), _TERNARY[record.type_name]
            )
        except RuntimeError as wrong:
            raise CheckpointError(f"{header.path.name}: tensor {record.name!r}: {wrong}") from None
        except ValueError:
            pass  # blocks of several scales, as of a model that was not trained ternary
    if not exact:
        return _dequantize(header, record, data, notes)
    return (_PLAIN | _LOW_BIT)[record.type_name](data, record.shape)


def _matrix_shape(record: TensorRecord) -> tuple[int, int]:
    return record.shape[0], record.shape[1]


def _i2_s(header: GGUFHeader, record: TensorRecord, order: np.ndarray[Any, Any] | None, linear: bool) -> Weight:
    """2-bit values, row after row, then the matrix's scale."""
    data = header.read_flat(record)
    scale = float(data[-I2_S_TAIL:][:4].view("<f4")[0])
    values = data[:-I2_S_TAIL].reshape(record.shape[0], -1)
    payload = torch.from_numpy(np.ascontiguousarray(values if order is None else values[order]))
    try:
        weight = wrap_ternary(payload, _matrix_shape(record), "i2_s", scale)
    except RuntimeError as wrong:
        raise CheckpointError(f"{header.path.name}: tensor {record.name!r}: {wrong}") from None
    return weight if linear else weight.dequantize()


def _rescaled(header: GGUFHeader, record: TensorRecord | None, of: TensorRecord, weight: Weight) -> Weight:
    """A weight times the scale that some converters keep in a tensor beside it."""
    if record is None:
        return weight
    if record.type_name != "F32" or math.prod(record.shape) != 1:
        raise CheckpointError(
            f"{header.path.name}: tensor {record.name!r} is {record.type_name} {list(record.shape)}; one F32 is needed"
        )
    if not isinstance(weight, PackedTernary):
        raise CheckpointError(f"{header.path.name}: tensor {record.name!r} scales {of.name!r}, which is not ternary")
    scale = float(header.read_flat(record).view("<f4")[0])
    return dataclasses.replace(weight, scale=weight.scale * scale)


def _dequantize(header: GGUFHeader, record: TensorRecord, data: Bytes, notes: list[str]) -> torch.Tensor:
    from gguf import dequantize
    from gguf.constants import GGMLQuantizationType

    if record.type_name in ("I8", "I16", "I32", "I64"):
        raise CheckpointError(
            f"{header.path.name}: tensor {record.name!r} holds {record.type_name} integers, not weights"
        )
    try:
        values = dequantize(data, GGMLQuantizationType(record.type_id))
    except (RuntimeError, ValueError, TypeError, KeyError) as wrong:
        raise CheckpointError(
            f"{header.path.name}: tensor {record.name!r} of type {record.type_name} cannot be read: {wrong}"
        ) from wrong
    notes.append(f"{record.name}: {record.type_name} has no exact low-bit form here and was dequantized to float32")
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(record.shape)


def repack_nibbles(blocks: Bytes) -> Bytes:
    """ggml nibbles to canonical: uint8 [..., 16] with element j low and j+16 high, to pairs (2j, 2j+1) of a byte."""
    words = np.ascontiguousarray(blocks).view("<u2")
    out = np.empty((*blocks.shape[:-1], 2, 8), dtype=np.uint8)
    np.copyto(out[..., 0, :], (words & 0x0F) | ((words >> 4) & 0xF0), casting="unsafe")
    np.copyto(out[..., 1, :], ((words >> 4) & 0x0F) | ((words >> 8) & 0xF0), casting="unsafe")
    return out.reshape(*blocks.shape)


def _halves(columns: Bytes) -> torch.Tensor:
    """Little-endian float16 pairs of bytes, uint8 [N, G, 2] to float16 [N, G]."""
    return torch.from_numpy(np.ascontiguousarray(columns).view("<f2")[..., 0].astype(np.float16))


def _q4_0(data: Bytes, shape: tuple[int, ...]) -> Weight:
    blocks = data.reshape(shape[0], -1, 18)
    codes = repack_nibbles(blocks[..., 2:]).reshape(shape[0], -1)
    return Int4Weight(torch.from_numpy(codes), _halves(blocks[..., :2]), None, (shape[0], shape[1]), _BLOCK)


def _q4_1(data: Bytes, shape: tuple[int, ...]) -> Weight:
    blocks = data.reshape(shape[0], -1, 20)
    codes = repack_nibbles(blocks[..., 4:]).reshape(shape[0], -1)
    scales, minima = _halves(blocks[..., :2]), _halves(blocks[..., 2:4])
    return Int4Weight(torch.from_numpy(codes), scales, minima, (shape[0], shape[1]), _BLOCK)


def _q8_0(data: Bytes, shape: tuple[int, ...]) -> Weight:
    blocks = data.reshape(shape[0], -1, 34)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(shape)
    return Int8Weight(torch.from_numpy(codes), _halves(blocks[..., :2]))


def _plain(numpy_type: str, torch_type: torch.dtype) -> _Reader:
    def read(data: Bytes, shape: tuple[int, ...]) -> Weight:
        values = np.ascontiguousarray(data).view(numpy_type).reshape(shape)
        return torch.from_numpy(values).view(torch_type)

    return read


_TERNARY: dict[str, TernaryFormat] = {"TQ1_0": "tq1_0", "TQ2_0": "tq2_0"}
_Reader = Callable[[Bytes, tuple[int, ...]], Weight]
_LOW_BIT: dict[str, _Reader] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}
_PLAIN: dict[str, _Reader] = {
    "F32": _plain("<f4", torch.float32),
    "F16": _plain("<f2", torch.float16),
    "BF16": _plain("<i2", torch.bfloat16),
}
