# SPDX-License-Identifier: Apache-2.0
"""A token mixer that fits, at each query, a weighted linear regression of values on keys (arXiv 2510.01450)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.nn.cache import MixerCache
from tilewright.nn.mixer import check_packed, current_columns, default_positions, heads_of, packing
from tilewright.nn.norms import RMSNorm
from tilewright.nn.rotary import apply_rotary
from tilewright.ops import lla_attention, lla_decode


class LocalLinearAttention(nn.Module):
    """:func:`tilewright.ops.lla_attention` between linear projections, with a key/value cache.

    The ridge is relative: lambda stands beside the covariance of the keys, so 1 is as strong as one unit of variance,
    which is what normed keys have. A small lambda fits a line through the neighbourhood, a large one is softmax
    attention.

    Args:
        hidden_size: D.
        num_heads: H, of the queries.
        num_kv_heads: of keys and values, a divisor of H; H when None.
        qk_norm: an RMS norm on each head's queries and keys.
        learn_lambda: "scalar", one number a head, "token", a linear function of the token for each head, both through
            a softplus; None: `ridge_lambda` stays.
        ridge_lambda: lambda, at the beginning.
        head_dim: K = V; D / H when None.
        window_size: a token sees itself and the window_size - 1 tokens before it; None: all. Padding does not count.
        rope_theta: base of rotary positions; None: no positions.
        cg_rtol, cg_max_iters: where the solver stops (heads wider than 32).
        warm_start: when decoding begin at the solution of the token before; the cache then cannot be cropped.
        norm_eps: of the norms.
        layer_idx: where keys and values lie in the cache.

    Raises:
        ValueError: the sizes do not divide into heads, or an option is out of range.
    """

    lower_bound_size: int | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        qk_norm: bool = True,
        learn_lambda: Literal["scalar", "token"] | None = "scalar",
        ridge_lambda: float = 1.0,
        head_dim: int | None = None,
        window_size: int | None = None,
        rope_theta: float | None = None,
        cg_rtol: float = 1e-4,
        cg_max_iters: int = 32,
        warm_start: bool = False,
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
        if learn_lambda not in ("scalar", "token", None):
            raise ValueError(f"{name}: learn_lambda = {learn_lambda!r}, needed 'scalar', 'token' or None")
        if not ridge_lambda > 0:
            raise ValueError(f"{name}: ridge_lambda = {ridge_lambda}, needed a positive number")
        self.window_size, self.rope_theta, self.warm_start = window_size, rope_theta, warm_start
        self.cg_rtol, self.cg_max_iters = cg_rtol, cg_max_iters
        self.learn_lambda, self.ridge_lambda = learn_lambda, ridge_lambda
        narrow = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(hidden_size, narrow, bias=False)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.ridge_proj = nn.Linear(hidden_size, num_heads, bias=False) if learn_lambda == "token" else None
        self.ridge_logit = None if learn_lambda is None else nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """lambda as given, for every head (and token, but for what the projection adds)."""
        del generator
        if self.ridge_logit is not None:
            nn.init.constant_(self.ridge_logit, self.ridge_lambda + math.log(-math.expm1(-self.ridge_lambda)))

    def ridge(self, hidden_states: Tensor) -> Tensor:
        """lambda: `[1]`, `[H]` or `[B, T, H]`, in float32 or wider; a learned one is at least 1e-6."""
        if self.ridge_logit is None:
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            return hidden_states.new_full((1,), self.ridge_lambda, dtype=wide)
        logit = self.ridge_logit
        if self.ridge_proj is not None:
            logit = logit + self.ridge_proj(hidden_states)
        return F.softplus(logit.to(torch.promote_types(logit.dtype, torch.float32))) + 1e-6

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

        A single token that continues a cache is decoded without gradients.
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
        batch, tokens = hidden_states.shape[:2]
        cache = MixerCache() if past_key_values is None and use_cache else past_key_values
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        positions = default_positions(hidden_states, seen, cu_seqlens) if position_ids is None else position_ids
        q, k, v = self._project(hidden_states, positions)
        rows = self.ridge(hidden_states).expand(batch, tokens, self.num_heads)
        keep = current_columns(attention_mask, tokens)
        if cache is None or not cache[self.layer_idx]:
            o = self._whole(q, k, v, rows, cu_seqlens, keep)
            if cache is not None:
                self._append(cache, k, v, keep)
        else:
            o = self._continued(cache, q, k, v, rows, keep)
        y = self.o_proj(o.flatten(-2))
        return (y if keep is None else y * keep[..., None]), None, cache

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, K], keys and values [B, T, H_kv, K]."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            q, k = apply_rotary(q, positions, self.rope_theta), apply_rotary(k, positions, self.rope_theta)
        return q, k, v

    def _options(self) -> dict[str, Any]:
        return {"window_size": self.window_size, "cg_rtol": self.cg_rtol, "cg_max_iters": self.cg_max_iters}

    def _whole(
        self, q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, cu_seqlens: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """Sequences from their beginning. Padding is left out by packing: a padded key is a point of the regression."""
        if keep is None:
            return lla_attention(q, k, v, ridge_lambda=ridge, cu_seqlens=cu_seqlens, **self._options())
        index, offsets = packing(keep)
        q_rows, k_rows, v_rows, ridges = (x.flatten(0, 1)[index][None] for x in (q, k, v, ridge))
        packed = lla_attention(q_rows, k_rows, v_rows, ridge_lambda=ridges, cu_seqlens=offsets, **self._options())
        return torch.zeros_like(q).flatten(0, 1).index_copy(0, index, packed[0]).view_as(q)

    def _append(self, cache: MixerCache, k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """All keys and values [B, L, H_kv, K] of the real tokens, first in their rows, and how many there are [B]."""
        batch, tokens = k.shape[:2]
        past = cache[self.layer_idx]
        old = past["key"].shape[-2] if past else 0
        before = past.get("length", torch.full((batch,), old, device=k.device)) if past else k.new_zeros(batch).long()
        now = torch.full_like(before, tokens) if keep is None else keep.sum(1)
        lengths = before + now
        new = {}
        for name, fresh in (("key", k), ("value", v)):
            if keep is None and "length" not in past:
                joined = fresh if not past else torch.cat((past[name].transpose(1, 2), fresh), 1)
            else:
                joined = fresh.new_zeros(batch, int(lengths.max()), *fresh.shape[2:])
                for b in range(batch):
                    if past:
                        joined[b, : before[b]] = past[name][b, :, : before[b]].transpose(0, 1)
                    joined[b, before[b] : lengths[b]] = fresh[b] if keep is None else fresh[b, keep[b]]
            new[name] = joined
        held = {name: joined.transpose(1, 2) for name, joined in new.items()}
        if keep is not None or "length" in past:
            held["length"] = lengths
        cache.update(self.layer_idx, tokens, **held)
        return new["key"], new["value"], lengths

    def _continued(
        self, cache: MixerCache, q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, keep: Tensor | None
    ) -> Tensor:
        """Tokens after those in the cache."""
        keys, values, lengths = self._append(cache, k, v, keep)
        if q.shape[1] == 1 and keep is None:
            start = cache[self.layer_idx].get("rho")
            o, rho = lla_decode(q, keys, values, lengths, ridge_lambda=ridge, rho_init=start, **self._options())
            if self.warm_start:
                cache.update(self.layer_idx, 0, rho=rho)
            return o
        rows = []
        for b in range(q.shape[0]):
            own = slice(None) if keep is None else keep[b]
            o = lla_attention(
                q[b : b + 1, own],
                keys[b : b + 1, : lengths[b]],
                values[b : b + 1, : lengths[b]],
                ridge_lambda=ridge[b : b + 1, own],
                **self._options(),
            )
            full = torch.zeros_like(q[b : b + 1])
            full[:, own] = o
            rows.append(full)
        return torch.cat(rows)

    def flops_per_token(self, context_length: int) -> float:
        """4 K a head, token seen and pass: one for the scores and the weighted sum, and one an iteration at the limit.

        Heads of up to 32 form K (K + 1) / 2 moments instead of iterating.
        """
        window = context_length if self.window_size is None else min(self.window_size, context_length)
        seen = window * (window + 1) / 2 + window * (context_length - window)
        size = self.head_dim
        solve = size * (size + 1) if size <= 32 else 4 * size * self.cg_max_iters
        return self.num_heads * (8 * size + solve) * seen / max(context_length, 1)

    def state_elements(self, context_length: int) -> dict[str, int]:
        """Keys and values kept after this many tokens."""
        return dict.fromkeys(("key", "value"), self.num_kv_heads * self.head_dim * context_length)
