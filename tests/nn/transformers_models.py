# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers models with linear-attention layers, and their recurrences in float64."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 61
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
_MIXED: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention"] * 2}
_MIXED["layer_types"] = _MIXED["layer_types"][:3]
_GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
# model_type: configuration, and the layers that must be found
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_MIXED, **_GATED_DELTA, **_EXPERTS, "head_dim": 16},
    "qwen3_5_text": {**_MIXED, **_GATED_DELTA, "head_dim": 16},
    "olmo_hybrid": {
        **_MIXED,
        **_GATED_DELTA,
        "linear_num_key_heads": 4,
        "num_key_value_heads": 2,
    },
    "kimi_linear": {
        **_MIXED,
        "linear_head_dim": 8,
        "linear_num_heads": 3,
        "num_key_value_heads": 2,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "minimax": {
        **_MIXED,
        "head_dim": 16,
        "block_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
    },
    "bamba": {**_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1], "tie_word_embeddings": True},
    "falcon_h1": {**_MAMBA, "num_hidden_layers": 2, "mamba_d_ssm": 64},
    "mamba2": {
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "expand": 2,
        "state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
}


def tiny_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in eval mode; gates are spread so that decays lie anywhere in (0, 1)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **(_COMMON | MODELS[kind]))
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "dt_bias")):
                parameter.copy_(torch.randn_like(parameter))
    return model.to(dtype)


def linear_layers(kind: str) -> int:
    config = MODELS[kind]
    mixers = config["layer_types"] if "layer_types" in config else ["linear_attention"] * config["num_hidden_layers"]
    return mixers.count("linear_attention") - len(config.get("attn_layer_indices", []))


def token_ids(batch: int, count: int, seed: int = 3) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def exact_model(model: nn.Module, patch: pytest.MonkeyPatch) -> Any:
    """The same weights in float64, every recurrence token by token in float64."""
    exact = copy.deepcopy(model).double()
    namespace = vars(sys.modules[type(model).__module__])
    for name, function in _EXACT.items():
        if name in namespace:
            patch.setitem(namespace, name, function)
    for layer in exact.modules():
        if type(layer).__name__ == "MiniMaxLightningAttention":
            layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
    return exact


def _steps(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [B, T, HV, K], v [B, T, HV, V], decay [B, T, HV, K or 1]; additive without beta."""
    out = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, :, None]
        write = v[:, t]
        if beta is not None:
            write = beta[:, t, :, None] * (write - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(out, dim=1), state


def _delta(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    unit = lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    group = value.shape[2] // key.shape[2]
    q, k = (unit(x).repeat_interleave(group, 2) for x in (query, key))
    decay = g.double().exp() if g.dim() == 4 else g.double().exp()[..., None]
    start = value.new_zeros(value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
    state = start if initial_state is None else initial_state
    return _steps(q * q.shape[-1] ** -0.5, k, value, decay, beta, state)


def _scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor,
    initial_states: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    batch, _tokens, heads, size = hidden_states.shape
    group = heads // B.shape[2]
    dt = torch.nn.functional.softplus(dt + dt_bias).clamp(*dt_limit)
    k, q = B.repeat_interleave(group, 2), C.repeat_interleave(group, 2)
    start = hidden_states.new_zeros(batch, heads, B.shape[-1], size)
    state = start if initial_states is None else initial_states.transpose(-1, -2)
    out, final = _steps(q, k, hidden_states * dt[..., None], (A.double() * dt).exp()[..., None], None, state)
    out = out + D[:, None] * hidden_states
    return (out, final.transpose(-1, -2)) if return_final_states else out


def _update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    dt_bias: Tensor,
    z: Tensor | None = None,
    **_: Any,
) -> Tensor:
    one = [x[:, None] for x in (hidden_states, dt[..., 0])] + [A[:, 0, 0]] + [x[:, None] for x in (B, C)]
    out, final = _scan(*one, D=D[:, 0], dt_bias=dt_bias[:, 0], initial_states=state, return_final_states=True)
    state.copy_(final)
    return out[:, 0] if z is None else out[:, 0] * torch.nn.functional.silu(z)


_EXACT = {
    "torch_chunk_gated_delta_rule": _delta,
    "torch_recurrent_gated_delta_rule": _delta,
    "chunk_kimi_delta_attention": _delta,
    "recurrent_kimi_delta_attention": _delta,
    "mamba2_chunk_scan": _scan,
    "mamba2_selective_state_update": _update,
}
