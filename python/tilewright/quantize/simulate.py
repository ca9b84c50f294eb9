# SPDX-License-Identifier: Apache-2.0
"""Quantizers simulated inside a float transformers model: any number of bits, no kernel needed.

Values are rounded to their low-bit grid and turned back into float, so that a method can be judged for
bits and combinations that have no kernel, and kernels against the arithmetic they promise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.capture import Site, Transform, intervened
from tilewright.reference.low_bit import E4M3_MAX, fake_int8, fake_quantize

ATTENTION = "tilewright_simulated"
_LINEARS = r"re:model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj@input"
MAX_KV_GROUP = 128


def fake_fp8(x: Tensor) -> Tensor:
    """x to its per-token e4m3 value by torch's own cast; the fast twin of :func:`reference.low_bit.fake_fp8`."""
    scale = x.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def fake_activations(kind: str, group_size: int | None = None) -> Callable[[Tensor], Tensor]:
    """The activation quantizer "fp8" (one scale a token), "int8" (one a token, or a group of columns) or "none"."""
    quantizers: dict[str, Callable[[Tensor], Tensor]] = {
        "fp8": fake_fp8,
        "int8": lambda x: fake_int8(x, group_size),
        "none": lambda x: x,
    }
    if kind not in quantizers:
        raise ValueError(f"activations={kind!r}; need one of {', '.join(map(repr, quantizers))}")
    if group_size is not None and kind != "int8":
        raise ValueError(f"activation_group={group_size} with activations={kind!r}; only int8 has groups")
    return quantizers[kind]


@dataclass(frozen=True)
class Simulation:
    """What to round. activations: inputs of the decoder's linears, "none", "fp8" per token or "int8" per
    token, or per ``activation_group`` columns (64 is what the decode engine does).

    query: "none" or "fp8" per token and head, after RoPE. key_bits, value_bits: None or a number of bits,
    symmetric, one scale per token, head and group of up to 128 channels. key_clip: the largest key of a
    group is taken as this fraction of it, larger ones saturate (1: nothing is clipped).
    """

    activations: str = "none"
    query: str = "none"
    key_bits: int | None = None
    value_bits: int | None = None
    key_clip: float = 1.0
    activation_group: int | None = None


@contextlib.contextmanager
def simulated(module: nn.Module, what: Simulation, key_scales: list[Tensor] | None = None) -> Iterator[None]:
    """While the context lives, the transformers model ``module`` computes with these roundings.

    key_scales: S [H_kv, D] of every layer: keys are multiplied, queries divided by it after RoPE, before
        rounding. Needs full causal attention without padding, and no cache.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention(what, key_scales))
    theirs: Any = module
    before = theirs.config._attn_implementation
    theirs.set_attn_implementation(ATTENTION)
    inputs: dict[str | Site, Transform] = {}
    if what.activations != "none" or what.activation_group:
        inputs[_LINEARS] = fake_activations(what.activations, what.activation_group)
    try:
        with intervened(module, inputs):
            yield
    finally:
        theirs.set_attn_implementation(before)


def _attention(what: Simulation, key_scales: list[Tensor] | None) -> Callable[..., tuple[Tensor, None]]:
    round_query = fake_activations(what.query)

    def attention(
        layer: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _mask: Tensor | None,
        *,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """q [B, H, T, D], k and v [B, H_kv, T, D] after RoPE -> [B, T, H, D]."""
        if key_scales is not None:
            scale = key_scales[int(layer.layer_idx)].to(k)[None, :, None]  # type: ignore[arg-type]
            k = k * scale
            q = q / scale.repeat_interleave(q.shape[1] // k.shape[1], 1)
        q = round_query(q)
        group = min(k.shape[-1], MAX_KV_GROUP)
        if what.key_bits is not None:
            k = fake_quantize(k, group, what.key_bits, clip=what.key_clip)
        if what.value_bits is not None:
            v = fake_quantize(v, group, what.value_bits)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    return attention
