# SPDX-License-Identifier: Apache-2.0
"""Channel scaling of linears, offline and function-preserving (FireQ, spec section 3).

Lambda_j multiplies input channel j of a linear and divides the output channel of its producer. It
flattens the columns of the weight, where INT4 is coarse, and leaves the spread to the activations,
where FP8 has range: the reverse of SmoothQuant.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from tilewright.models.config import LlamaConfig
from tilewright.quantize.fireq.config import ChannelScaling

Weights = MutableMapping[str, Tensor]
CONSUMERS = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_output": ("mlp.down_proj",),
}
# up enters the gated product linearly, gate goes through SiLU: only up can take the inverse.
PRODUCERS = {
    "attention_input": "input_layernorm",
    "attention_output": "self_attn.v_proj",
    "mlp_input": "post_attention_layernorm",
    "mlp_output": "mlp.up_proj",
}


def shared(values: Tensor, site: str, config: LlamaConfig, stat: str) -> Tensor:
    """Statistic per input column [K] to one per producer channel.

    They differ at "attention_output" only: with grouped queries one V channel feeds the same in-head
    index of every query head of its group, [H D] -> [H_kv D].
    """
    if site != "attention_output":
        return values
    heads = values.view(config.num_key_value_heads, -1, config.head_dim)
    return (heads.amax(1) if stat == "max" else heads.mean(1)).flatten()


def expanded(factor: Tensor, site: str, config: LlamaConfig) -> Tensor:
    """A factor per producer channel as one per input column: the inverse of :func:`shared`."""
    if site != "attention_output":
        return factor
    group = config.num_attention_heads // config.num_key_value_heads
    heads = factor.view(config.num_key_value_heads, 1, config.head_dim)
    return heads.expand(-1, group, -1).flatten()


def channel_factors(weights: Mapping[str, Tensor], prefix: str, scaling: ChannelScaling, config: LlamaConfig) -> Tensor:
    """Lambda [producer channels] of one site of one layer; ``prefix`` is ``model.layers.<i>.``.

    A column of zeros gets 1.
    """
    rows = torch.cat([weights[f"{prefix}{name}.weight"] for name in CONSUMERS[scaling.site]]).abs()
    columns = rows.amax(0) if scaling.stat == "max" else rows.mean(0)
    stat = shared(columns, scaling.site, config, scaling.stat)
    const = geometric_mean(stat) if isinstance(scaling.const, str) else scaling.const
    return torch.where(stat > 0, const / stat, torch.ones(()))


def geometric_mean(values: Tensor) -> float:
    """exp of the mean logarithm of the positive values; 1 if there are none."""
    positive = values[values > 0].double()
    return float(positive.log().mean().exp()) if len(positive) else 1.0


def scale_channels(weights: Weights, prefix: str, site: str, factor: Tensor, config: LlamaConfig) -> None:
    """Apply Lambda ``factor`` [producer channels] to one site: columns of the consumers times, producer by.

    ``weights`` holds float tensors; the changed ones are replaced, not written into.
    """
    columns = expanded(factor, site, config)
    for name in CONSUMERS[site]:
        weights[f"{prefix}{name}.weight"] = weights[f"{prefix}{name}.weight"] * columns
    producer = prefix + PRODUCERS[site]
    weight = weights[f"{producer}.weight"]
    weights[f"{producer}.weight"] = weight / (factor if weight.dim() == 1 else factor[:, None])
    if f"{producer}.bias" in weights:
        weights[f"{producer}.bias"] = weights[f"{producer}.bias"] / factor


def scale_values(weights: Weights, prefix: str, v_mul: float) -> None:
    """W_v (and its bias) times v_mul, W_o divided by it; its own bias is not touched."""
    for name, factor in (("v_proj.weight", v_mul), ("v_proj.bias", v_mul), ("o_proj.weight", 1 / v_mul)):
        if f"{prefix}self_attn.{name}" in weights:
            weights[f"{prefix}self_attn.{name}"] = weights[f"{prefix}self_attn.{name}"] * factor
