# SPDX-License-Identifier: Apache-2.0
"""Attention of a transformers model through ``int4_fp8_attention``: what the decode engine computes, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from tilewright.models.hf_names import cache_name, cache_of
from tilewright.models.image import CacheFormat, QueryFormat
from tilewright.models.int4_cache import Int4KVCache, StoredRows, stored_cache
from tilewright.ops import int4_fp8_attention
from tilewright.ops.kv_cache import KVCache, kv_append_

NAME = "tilewright"
"""Of the attention in transformers' registry (``model.set_attn_implementation``)."""

_FORMATS = "tilewright_formats"


@dataclass(frozen=True)
class AttentionFormats:
    """What keys, values and queries are rounded to where they meet."""

    kv: CacheFormat
    query: QueryFormat


def attach(attention: nn.Module, formats: AttentionFormats, key_scale: Tensor | None) -> None:
    """Prepare one of transformers' attention modules for :func:`attend`.

    Args:
        attention: a LlamaAttention, MistralAttention or Qwen2Attention.
        key_scale: float [H_kv, D], keys are multiplied by it and queries divided; None: neither.
    """
    setattr(attention, _FORMATS, formats)
    scales = None if key_scale is None else key_scale.to(torch.float32)
    attention.register_buffer("key_scale", scales, persistent=False)
    attention.register_forward_pre_hook(_read_as_stored, with_kwargs=True)


def _read_as_stored(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An INT4 cache hands its codes to :func:`attend`, which reads them as they are."""
    cache = cache_of(kwargs)
    if isinstance(cache, Int4KVCache) and getattr(module.config, "_attn_implementation", None) == NAME:
        kwargs = kwargs | {cache_name(): StoredRows(cache)}
    return args, kwargs


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a packed KV cache; padded rows become packed sequences without padding.

    Args:
        query: [B, H, T, D]; the last T of the positions that key and value hold.
        key, value: float [B, H_kv, L, D], rounded to the module's cache format here; or the uint8 rows that an
            :class:`Int4KVCache` holds.
        attention_mask: bool [B, at least L], False at padding; None: no padding.

    Returns:
        [B, T, H, D] (zeros at padding), and no attention weights.

    Raises:
        ValueError: a mask that is not per token, several texts in one row, or dropout.
    """
    formats = getattr(module, _FORMATS, None)
    if not isinstance(formats, AttentionFormats):
        raise ValueError(f"attention {NAME!r} belongs to models made by tilewright.models.to_transformers()")
    if dropout:
        raise ValueError(f"attention {NAME!r}: dropout = {dropout}, needed 0; it has no gradients")
    real = _real_positions(attention_mask, key.shape[2])
    if real is None and position_ids is not None and bool((position_ids.diff(dim=-1) < 0).any()):
        raise ValueError(f"attention {NAME!r}: position_ids fall within a row; give each text a row of its own")
    tokens = query.shape[2]
    queries, offsets = _pack(query, None if real is None else real[:, -tokens:])
    scale = module.key_scale if isinstance(module.key_scale, Tensor) else None
    if scale is not None:
        queries = queries * (1.0 / scale).repeat_interleave(query.shape[1] // key.shape[1], 0)
    cache = stored_cache(key, value, query.shape[3], real) if key.dtype == torch.uint8 else None
    if cache is None:
        cache = _rounded(key, value, real, formats.kv, scale)
    window = None if sliding_window is None else int(sliding_window)
    out = int4_fp8_attention(queries, cache, offsets, scale=scaling, window=window, query=formats.query)
    return _unpack(out, query, None if real is None else real[:, -tokens:]), None


def _real_positions(mask: Tensor | None, length: int) -> Tensor | None:
    """bool [B, length]: which positions hold tokens; None: all."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] < length:
        raise ValueError(
            f"attention {NAME!r}: attention_mask has shape {list(mask.shape)}, needed [B, at least {length}] with a "
            f"zero at each padding position; other masks work after model.set_attn_implementation('sdpa')"
        )
    real = mask[:, -length:].bool()
    return None if bool(real.all()) else real


def _pack(x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, H, T, D] to the real tokens [R, H, D], row after row, and where each row starts."""
    batch, _, tokens, _ = x.shape
    rows = x.transpose(1, 2)
    if real is None:
        return rows.flatten(0, 1).contiguous(), torch.arange(batch + 1) * tokens
    return rows[real], nn.functional.pad(real.sum(1).cumsum(0), (1, 0))


def _unpack(out: Tensor, query: Tensor, real: Tensor | None) -> Tensor:
    batch, heads, tokens, dim = query.shape
    if real is None:
        return out.view(batch, tokens, heads, dim).to(query.dtype)
    whole = query.new_zeros(batch, tokens, heads, dim)
    whole[real] = out.to(query.dtype)
    return whole


def _rounded(key: Tensor, value: Tensor, real: Tensor | None, kv: CacheFormat, scale: Tensor | None) -> KVCache:
    """Float keys and values as the cache that would hold them."""
    batch, heads, length, dim = key.shape
    cache = KVCache.allocate(batch, heads, dim, max(length, 1), kv, scale_dtype=torch.float32)
    keys, offsets = _pack(key, real)
    values, _ = _pack(value, real)
    kv_append_(cache, keys if scale is None else keys.float() * scale, values, offsets)
    return cache


def _padding_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **_kwargs: Any
) -> Tensor | None:
    """transformers' mask interface: the mask of padding itself; causality and windows are the operator's."""
    del batch_size, q_length, kv_length
    return attention_mask


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _padding_mask)
