# SPDX-License-Identifier: Apache-2.0
"""transformers' torch implementations of linear attention: what its models run where no kernel is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]


def why_absent() -> str | None:
    """One line why there is no such peer, or None."""
    return (
        None if importlib.util.find_spec("transformers") else "transformers not installed; pip install tilewright[all]"
    )


def gated_delta(x: Inputs) -> Tensor:
    """qwen3_next's chunked gated delta rule; without g in the inputs, g = 0."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    g = x["g"] if "g" in x else torch.zeros_like(x["beta"])
    return torch_chunk_gated_delta_rule(x["q"], x["k"], x["v"], g=g, beta=x["beta"])[0]


def kda(x: Inputs) -> Tensor:
    """kimi_linear's chunked delta attention."""
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    return chunk_kimi_delta_attention(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"])[0]


class _Given(nn.Module):
    """Stands where a projection stood and returns what it was given."""

    def __init__(self, value: Tensor | None = None) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x if self.value is None else self.value


@cache
def _minimax_layer(heads: int, size: int) -> nn.Module:
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    kinds = ["linear_attention"] * 2
    config = MiniMaxConfig(
        hidden_size=8, num_attention_heads=heads, head_dim=size, num_hidden_layers=2, layer_types=kinds
    )
    layer = MiniMaxLightningAttention(config, 0)
    layer.act_fn, layer.norm, layer.out_proj = nn.Identity(), nn.Identity(), nn.Identity()
    layer.output_gate = _Given(torch.full((1,), 100.0))  # its sigmoid is 1
    return layer


def lightning(x: Inputs) -> Tensor:
    """MiniMax's lightning attention: the layer with its projections, norm and activation taken out.

    What stays besides the attention is a sigmoid and a product of the output's size. Slopes are those of layer 0 of 2.
    """
    batch, tokens, heads, size = x["q"].shape
    layer = _minimax_layer(heads, size)
    layer.qkv_proj = _Given(torch.cat((x["q"], x["k"], x["v"]), -1).flatten(2))
    return layer(x["q"].new_zeros(batch, tokens, 8), None, None)[0].unflatten(-1, (heads, size))


def gated_delta_step(x: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """qwen3_next's recurrence over the tokens of x, as its decoding calls it."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    out, state = torch_recurrent_gated_delta_rule(
        x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], initial_state=state, output_final_state=True
    )
    return out, state


FORMS: dict[str, Callable[[Inputs], Tensor]] = {
    "delta": gated_delta,
    "gated_delta": gated_delta,
    "kda": kda,
    "lightning": lightning,
}
