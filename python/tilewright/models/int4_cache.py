# SPDX-License-Identifier: Apache-2.0
"""An INT4 key/value cache for transformers: FireQ's cache format (arXiv 2505.20839, section on the KV cache)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from tilewright.formats.int4 import pack_codes
from tilewright.models.language_model import LanguageModel

MAX_GROUP = 128
_LARGEST, _ZERO, _SCALE_BYTES = 7, 8, 4


class Int4KVCache(Cache):
    """Keys and values at 4 bits a number, one float32 scale per token, head and group of up to 128 channels.

    Give it to any transformers model of the Llama family as ``past_key_values``; attention then sees the
    rounded keys and values. Where the model carries a post-RoPE key scale S (``self_attn.key_scale``), keys
    are rounded after multiplication with S and divided by it on the way out.

    Args:
        model: the loaded model whose layers the cache serves.
    """

    def __init__(self, model: LanguageModel) -> None:
        layers: list[Any] = []
        for index in range(model.config.num_hidden_layers):
            name = f"model.layers.{index}.self_attn.key_scale"
            layers.append(Int4CacheLayer(model.dense(name) if name in model.weights else None))
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes held at the present length."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, Int4CacheLayer))


class Int4CacheLayer(DynamicLayer):
    """One layer: ``keys`` and ``values`` are uint8 [B, H, L, D/2 + 4 G], codes and then the bytes of the scales.

    Keeping both in one tensor lets every operation that transformers performs on a growing cache (reorder,
    crop, repeat, select) apply unchanged.
    """

    def __init__(self, key_scale: Tensor | None = None) -> None:
        super().__init__()
        self.key_scale = None if key_scale is None else key_scale[:, None, :]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() for t in (self.keys, self.values) if t is not None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and head size of the model, with nothing stored yet."""
        self.dtype, self.device, self.head_dim = key_states.dtype, key_states.device, key_states.shape[-1]
        self.keys = quantize_rows(key_states[..., :0, :])
        self.values = quantize_rows(value_states[..., :0, :])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, H, T, D] and return all keys and values as the cache holds them, in the model's dtype."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        scaled = key_states if self.key_scale is None else key_states.float() * self.key_scale
        self.keys = torch.cat((self.keys, quantize_rows(scaled)), dim=-2)
        self.values = torch.cat((self.values, quantize_rows(value_states)), dim=-2)
        keys = dequantize_rows(self.keys, self.head_dim)
        if self.key_scale is not None:
            keys = keys / self.key_scale
        return keys.to(self.dtype), dequantize_rows(self.values, self.head_dim).to(self.dtype)


def quantize_rows(x: Tensor) -> Tensor:
    """Round vectors [..., D] to symmetric INT4 (scale = absmax / 7 of a group): uint8 [..., D/2 + 4 G].

    A group of zeros gets scale 1. A group with a NaN or an infinity gets scale NaN, so that it stays visible.
    """
    dim = x.shape[-1]
    group = min(dim, MAX_GROUP)
    groups = torch.nn.functional.pad(x.float(), (0, -dim % group)).unflatten(-1, (-1, group))
    absmax = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax / _LARGEST)
    scale = torch.where(torch.isfinite(absmax), scale, torch.full_like(scale, torch.nan))
    codes = (groups / scale).round().clamp(-_LARGEST, _LARGEST).nan_to_num() + _ZERO
    packed = pack_codes(codes.to(torch.uint8).flatten(-2)[..., :dim])
    return torch.cat((packed, scale.squeeze(-1).contiguous().view(torch.uint8)), dim=-1)


def dequantize_rows(rows: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`quantize_rows`: float32 [..., D]."""
    half = (dim + 1) // 2
    codes, scales = rows[..., :half], rows[..., half:].contiguous().view(torch.float32)
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., :dim]
    per_channel = scales.repeat_interleave(min(dim, MAX_GROUP), dim=-1)[..., :dim]
    return (pairs.float() - _ZERO) * per_channel
