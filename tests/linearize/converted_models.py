# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers models of every type that can be converted, and rotary angles."""

from __future__ import annotations

import torch
import transformers

TYPES = ("Llama", "Mistral", "Qwen2", "Qwen3")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(kind: str = "Llama", **changes):
    """Width 48, six query and two key heads of 16 (so heads * head size is not the width), spread-out weights."""
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def angles(tokens: int, dim: int = 16, dtype: torch.dtype = torch.float64):
    """Rotary angles [T, D/2], and cos and sin [1, T, D] as transformers hands them on."""
    turn = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.logspace(0, -3, dim // 2, dtype=torch.float64)
    both = torch.cat([turn, turn], -1)[None]
    return turn, both.cos().to(dtype), both.sin().to(dtype)
