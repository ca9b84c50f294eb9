# SPDX-License-Identifier: Apache-2.0
"""An INT4 key/value cache for transformers: FireQ's cache format (arXiv 2505.20839, section on the KV cache)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from tilewright.models.language_model import LanguageModel
from tilewright.ops.kv_cache import KV_GROUP, KVCache, kv_append_

_SCALE_DTYPE, _SCALE_BYTES = torch.float32, 4


class Int4KVCache(Cache):
    """Keys and values at 4 bits a number, one float32 scale per token, head and group of up to 128 channels.

    Give it to any transformers model of the Llama family as its ``cache`` (``past_key_values`` before transformers
    5.24); attention then sees the rounded keys and values. A low-bit model of
    :func:`tilewright.models.to_transformers` reads the codes themselves, as the decode engine does. Where the model
    carries a post-RoPE key scale S (``self_attn.key_scale``), keys are rounded after multiplication with S and divided
    by it on the way out.

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
    """One layer: ``keys`` and ``values`` are uint8 [B, H, L, D/2 + 2 G], codes and then the bytes of the scales.

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
        del value_states  # has the shape of key_states
        self.dtype, self.device, self.head_dim = key_states.dtype, key_states.device, key_states.shape[-1]
        width = (self.head_dim + 1) // 2 + _SCALE_BYTES * -(-self.head_dim // KV_GROUP)
        empty = torch.empty((*key_states.shape[:2], 0, width), dtype=torch.uint8, device=self.device)
        self.keys, self.values = empty, empty.clone()
        self.is_initialized = True

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Round and append [B, H, T, D]; returns the rows of all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        scaled = key_states if self.key_scale is None else key_states.float() * self.key_scale
        new_keys, new_values = _quantize(scaled, value_states)
        self.keys = torch.cat((self.keys, new_keys), dim=-2)
        self.values = torch.cat((self.values, new_values), dim=-2)
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, H, T, D] and return all keys and values as the cache holds them, in the model's dtype."""
        del args, kwargs
        rows = self.append(key_states, value_states)
        keys, values = stored_cache(*rows, self.head_dim).dequantize()
        if self.key_scale is not None:
            keys = keys / self.key_scale
        return keys.to(self.dtype), values.to(self.dtype)


class StoredRows:
    """An Int4KVCache as the attention of a low-bit model sees it: ``update`` returns rows, not numbers."""

    def __init__(self, cache: Int4KVCache) -> None:
        self.cache = cache

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to one layer; uint8 [B, H, L, bytes] for keys and for values."""
        layer = self.cache.layers[layer_idx]
        assert isinstance(layer, Int4CacheLayer)
        return layer.append(keys, values)


def _quantize(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, T, D] floats to rows of codes and scale bytes, by the operator that also fills the engine's cache."""
    batch, heads, tokens, dim = keys.shape
    if tokens == 0:
        empty = torch.empty((batch, heads, 0, (dim + 1) // 2 + _SCALE_BYTES * -(-dim // KV_GROUP)), dtype=torch.uint8)
        return empty, empty
    scratch = KVCache.allocate(batch, heads, dim, tokens, scale_dtype=_SCALE_DTYPE)
    flat = [x.transpose(1, 2).reshape(batch * tokens, heads, dim).contiguous() for x in (keys, values)]
    kv_append_(scratch, flat[0], flat[1], torch.arange(batch + 1) * tokens)
    assert scratch.k_scales is not None
    assert scratch.v_scales is not None
    return (
        torch.cat((scratch.k_codes, scratch.k_scales.view(torch.uint8)), dim=-1),
        torch.cat((scratch.v_codes, scratch.v_scales.view(torch.uint8)), dim=-1),
    )


def stored_cache(keys: Tensor, values: Tensor, dim: int, real: Tensor | None = None) -> KVCache:
    """The rows [B, H, L, bytes] of an :class:`Int4CacheLayer` as the operators' cache.

    Args:
        real: bool [B, L]; the rows of positions that are not real are left out. None: all are.
    """
    lengths = torch.full((keys.shape[0],), keys.shape[2])
    if real is not None:
        first = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None]
        keys, values = keys.take_along_dim(first, 2), values.take_along_dim(first, 2)
        lengths = real.sum(1)
    half = (dim + 1) // 2
    codes = [rows[..., :half].contiguous() for rows in (keys, values)]
    scales = [rows[..., half:].contiguous().view(_SCALE_DTYPE) for rows in (keys, values)]
    return KVCache(codes[0], codes[1], scales[0], scales[1], lengths, dim)
