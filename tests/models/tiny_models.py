# SPDX-License-Identifier: Apache-2.0
"""Tiny Llama-family checkpoints, written in every supported form, for the tests of loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from tilewright.models import LlamaConfig
from tilewright.models.language_model import expected_shapes

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
KINDS = gguf.GGMLQuantizationType


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two layers, width 64, four query and two key heads of 16."""
    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return LlamaConfig(**(values | changes))


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32 weights by transformers' names; norms near one, matrices with the usual spread."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator) * 0.1
        weights[name] = values + 1 if "norm" in name else values
    return weights


def interleave_rows(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a half-split rotary matrix in GGUF's interleaved order, one row at a time."""
    size = matrix.shape[0] // heads
    out = np.empty_like(matrix)
    for head in range(heads):
        for pair in range(size // 2):
            out[head * size + 2 * pair] = matrix[head * size + pair]
            out[head * size + 2 * pair + 1] = matrix[head * size + size // 2 + pair]
    return out


def gguf_name(name: str) -> str:
    """GGUF's name of a transformers parameter."""
    stem, leaf = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.{leaf}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{leaf}"


def write_gguf(
    path: Path,
    config: LlamaConfig,
    weights: dict[str, torch.Tensor],
    kind: KINDS = KINDS.Q4_1,
    *,
    embedding: KINDS = KINDS.Q8_0,
    rope_factors: np.ndarray | None = None,
    tokens: bool = True,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a GGUF file with the gguf package's writer: matrices in ``kind``, vectors in F32."""
    architecture = "qwen2" if config.model_type == "qwen2" else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    _write_keys(writer, config, tokens)
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    for name, tensor in weights.items():
        values = tensor.float().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = interleave_rows(values, heads)
        chosen = KINDS.F32 if values.ndim == 1 else embedding if "embed" in name or "lm_head" in name else kind
        if chosen == KINDS.F32:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_keys(writer: gguf.GGUFWriter, config: LlamaConfig, tokens: bool) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(byte_tokens(config.vocab_size))
        writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
        writer.add_token_merges(["a b", "ab c"])
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])


def byte_tokens(count: int) -> list[str]:
    """A byte-level vocabulary: three control tokens, printable characters, then two merged tokens."""
    plain = ["<|end|>", "<|start|>", "<|stop|>"] + [chr(c) for c in range(33, 33 + count - 6)] + ["Ġ", "ab", "abc"]
    return plain[:count]


def write_transformers(
    directory: Path,
    config: LlamaConfig,
    tensors: dict[str, torch.Tensor],
    *,
    shards: int = 1,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write a transformers directory; more than one shard comes with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = config.to_transformers() | (changes or {})
    (directory / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
        return directory
    mapping = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(mapping.values()):
        part = {name: t for name, t in tensors.items() if mapping[name] == file}
        save_file(part, str(directory / file), metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return directory
