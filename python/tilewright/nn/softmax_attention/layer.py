# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention with rotary positions (Vaswani et al. 2017; Su et al., arXiv 2104.09864)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.nn.cache import MixerCache
from tilewright.nn.mixer import check_packed, current_columns, default_positions, heads_of
from tilewright.nn.norms import RMSNorm
from tilewright.nn.rotary import apply_rotary
from tilewright.ops.sequence import SequencePiece, piece

_BLOCK = 256


class SoftmaxAttention(nn.Module):
    """``softmax(q k^T / sqrt(K)) v`` over the past, grouped queries, rotary positions; torch's fused operator.

    Args:
        hidden_size: D.
        num_heads: H, of the queries.
        num_kv_heads: of keys and values, a divisor of H; H when None.
        head_dim: K = V; D / H when None.
        window_size: a token sees itself and the window_size - 1 tokens before it; None: all. Columns are counted,
            so padding belongs on the left.
        rope_theta: base of the rotary frequencies; None: no positions.
        qk_norm: an RMS norm on each head's queries and keys.
        norm_eps: of that norm.
        layer_idx: where keys and values lie in the cache.

    Raises:
        ValueError: the sizes do not divide into heads, or an option is out of range.
    """

    lower_bound_size: int | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.hidden_size, self.num_heads, self.layer_idx = hidden_size, num_heads, layer_idx
        width = hidden_size if head_dim is None else num_heads * head_dim
        self.head_dim = heads_of(name, "width of the queries", width, num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"{name}: num_heads = {num_heads} is not a multiple of num_kv_heads = {num_kv_heads}")
        if window_size is not None and window_size < 1:
            raise ValueError(f"{name}: window_size = {window_size}, needed at least 1, or None for no window")
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"{name}: heads of {self.head_dim}; rotary positions need an even number")
        self.window_size, self.rope_theta = window_size, rope_theta
        narrow = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(hidden_size, narrow, bias=False)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, MixerCache | None]:
        """Mix tokens: arguments and results of :meth:`tilewright.nn.mixer.Mixer.forward`.

        attention_mask with a cache: [B, past + T], so that padding in the past stays unseen.
        """
        del kwargs  # what other mixers take besides
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{type(self).__name__}: hidden_states has shape {list(hidden_states.shape)}, "
                f"needed [B, T, {self.hidden_size}]"
            )
        if cu_seqlens is not None:
            cached = past_key_values is not None or use_cache
            check_packed(type(self).__name__, hidden_states, cu_seqlens, attention_mask, cached)
        tokens = hidden_states.shape[1]
        cache = MixerCache() if past_key_values is None and use_cache else past_key_values
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        positions = default_positions(hidden_states, seen, cu_seqlens) if position_ids is None else position_ids
        q, k, v = self._project(hidden_states, positions)
        if cu_seqlens is not None:
            if piece() is not None:
                raise ValueError("SoftmaxAttention: cu_seqlens came with pieces of sequences; give whole rows")
            o = _packed(q, k, v, cu_seqlens, self.window_size)
        else:
            if (here := piece()) is not None:
                k, v = _until_here(here, k, v, attention_mask, cache)
            if cache is not None:
                k, v = self._cached(cache, k, v, tokens)
            o = attend(q, k, v, _visible(attention_mask, k.shape[-2], tokens), self.window_size)
        y = self.o_proj(o.transpose(1, 2).flatten(-2))
        if (keep := current_columns(attention_mask, tokens)) is not None:
            y = y * keep[..., None]
        return y, None, cache

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, K], keys and values [B, H_kv, T, K]."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            q, k = apply_rotary(q, positions, self.rope_theta), apply_rotary(k, positions, self.rope_theta)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _cached(self, cache: MixerCache, k: Tensor, v: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values with those of the past in front; the cache keeps what the next token may see."""
        past = cache[self.layer_idx]
        if past:
            k, v = torch.cat((past["key"], k), -2), torch.cat((past["value"], v), -2)
        kept = slice(None) if self.window_size is None else slice(max(0, k.shape[-2] - self.window_size + 1), None)
        cache.update(self.layer_idx, tokens, key=k[..., kept, :], value=v[..., kept, :])
        return k, v

    def flops_per_token(self, context_length: int) -> float:
        """4 K a head and token seen: the score and the weighted sum; averaged over a sequence of this length."""
        window = context_length if self.window_size is None else min(self.window_size, context_length)
        seen = window * (window + 1) / 2 + window * (context_length - window)
        return 4.0 * self.num_heads * self.head_dim * seen / max(context_length, 1)

    def state_elements(self, context_length: int) -> dict[str, int]:
        """Keys and values kept after this many tokens."""
        kept = context_length if self.window_size is None else min(context_length, self.window_size - 1)
        return dict.fromkeys(("key", "value"), self.num_kv_heads * self.head_dim * kept)


class SlidingWindowAttention(SoftmaxAttention):
    """:class:`SoftmaxAttention` whose window must be given: its cache stops growing there."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        window_size: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        layer_idx: int = 0,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            window_size=window_size,
            rope_theta=rope_theta,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            layer_idx=layer_idx,
        )


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, window: int | None) -> Tensor:
    """Causal attention of the last T positions over S.

    Args:
        q: [B, H, T, K].
        k, v: [B, H_kv, S, K], S >= T.
        visible: bool [B, S], false where a key is padding; None: all.
        window: a query sees this many keys, itself included; None: all.

    Returns:
        [B, H, T, K]. A query at padding sees itself alone.
    """
    tokens, length = q.shape[-2], k.shape[-2]
    if tokens == 0:
        return q
    if visible is None and tokens == length and (window is None or window >= length):
        return _sdpa(q, k, v, None, causal=True)
    if visible is None and tokens == 1 and (window is None or window >= length):
        return _sdpa(q, k, v, None, causal=False)
    if window is None or window >= length:
        return _sdpa(q, k, v, _band(tokens, length, length, visible, q.device), causal=False)
    # Blocks of queries, each with the keys that one of them may see: linear in the length.
    outputs, past = [], length - tokens
    for first in range(0, tokens, _BLOCK):
        last = min(first + _BLOCK, tokens)
        low, high = max(0, past + first - window + 1), past + last
        seen = None if visible is None else visible[:, low:high]
        mask = _band(last - first, high - low, window, seen, q.device)
        outputs.append(_sdpa(q[..., first:last, :], k[..., low:high, :], v[..., low:high, :], mask, causal=False))
    return torch.cat(outputs, -2)


def _band(tokens: int, length: int, window: int, visible: Tensor | None, device: torch.device) -> Tensor:
    """bool [T, S] or [B, 1, T, S]: true where query t, at place S - T + t, sees key s."""
    query = torch.arange(length - tokens, length, device=device)[:, None]
    key = torch.arange(length, device=device)
    mask = (key <= query) & (key > query - window)
    if visible is None:
        return mask
    return (mask & visible[:, None, None, :]) | (key == query)


def _until_here(
    here: SequencePiece, k: Tensor, v: Tensor, attention_mask: Tensor | None, cache: MixerCache | None
) -> tuple[Tensor, Tensor]:
    """Keys and values of all pieces up to this one, [B, H, S, K]."""
    if attention_mask is not None or cache is not None:
        what = "attention_mask" if cache is None else "a cache"
        raise ValueError(f"SoftmaxAttention: {what} came with pieces of sequences; give whole rows without a cache")
    k, v = (here.until_here(x.transpose(1, 2)).transpose(1, 2) for x in (k, v))
    return k, v


def _visible(attention_mask: Tensor | None, length: int, tokens: int) -> Tensor | None:
    """The mask's columns that belong to the S keys; a mask of the new tokens alone says that all before are real."""
    if attention_mask is None or tokens == 0:
        return None
    current_columns(attention_mask, tokens)  # raises where the shape does not fit
    mask = attention_mask[:, -length:].bool()
    mask = F.pad(mask, (length - mask.shape[1], 0), value=True)
    return None if bool(mask.all()) else mask


def _packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Each sequence by itself: the work is the sum of their squares, not the square of their sum."""
    lengths = cu_seqlens.diff().tolist()
    pieces = zip(q.split(lengths, -2), k.split(lengths, -2), v.split(lengths, -2), strict=True)
    return torch.cat([attend(*piece, None, window) for piece in pieces], -2) if lengths else q


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
