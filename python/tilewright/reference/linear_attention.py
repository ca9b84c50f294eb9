# SPDX-License-Identifier: Apache-2.0
"""Linear attention with a matrix state, token by token: the definition that every faster form is measured against.

Plain torch, so that autograd gives the oracle of the gradients too; float64 where the inputs are.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    rule: str = "additive",
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of linear attention and of the delta rule (Yang et al., arXiv 2406.06484 and 2412.06464).

    For each token: decay the state, write, read::

        S  <- diag(exp(g_t)) S
        S  <- S + k_t v_t^T                              rule "additive"
        S  <- S + k_t (beta_t (v_t - S^T k_t))^T         rule "delta"
        o_t = scale S^T q_t

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`, HV a multiple of H; value head j reads query and key head j // (HV / H).
        beta: `[B, T, HV]`, for the rule "delta"; 1 when None.
        g: natural logarithm of the decay: `[HV]`, `[B, T, HV]` or `[B, T, HV, K]`; None for no decay.
        scale: of q; K^-1/2 when None.
        initial_state: `[N, HV, K, V]`; zero when None.
        cu_seqlens: `[N+1]` with B = 1: offsets of packed sequences, each with a state of its own.

    Returns:
        o `[B, T, HV, V]` and the final states `[N, HV, K, V]`, in float64 if any input is, else in float32.
    """
    batch, tokens, heads, key_size = q.shape
    value_heads, value_size = v.shape[2:]
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    scale = max(key_size, 1) ** -0.5 if scale is None else scale
    group = value_heads // heads
    q, k = (x.to(dtype).repeat_interleave(group, dim=2) for x in (q, k))
    v = v.to(dtype)
    decay = _decay(g, batch, tokens, value_heads, dtype)
    write = torch.ones(batch, tokens, value_heads, dtype=dtype) if beta is None else beta.to(dtype)

    bounds = [(b, 0, tokens) for b in range(batch)]
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        bounds = [(0, first, last) for first, last in itertools.pairwise(offsets)]
    outputs: list[list[Tensor]] = [[] for _ in range(batch)]
    states = []
    for n, (b, first, last) in enumerate(bounds):
        state = v.new_zeros(value_heads, key_size, value_size)
        if initial_state is not None:
            state = initial_state[n].to(dtype)
        for t in range(first, last):
            if decay is not None:
                state = state * decay[b, t].exp()
            value = v[b, t]
            if rule == "delta":
                value = write[b, t, :, None] * (value - torch.einsum("hkv,hk->hv", state, k[b, t]))
            state = state + k[b, t, :, :, None] * value[:, None, :]
            outputs[b].append(scale * torch.einsum("hkv,hk->hv", state, q[b, t]))
        states.append(state)
    rows = [torch.stack(row) if row else v.new_zeros(0, value_heads, value_size) for row in outputs]
    if cu_seqlens is not None and rows[0].shape[0] < tokens:
        rows[0] = torch.cat([rows[0], v.new_zeros(tokens - rows[0].shape[0], value_heads, value_size)])
    o = torch.stack(rows) if rows else v.new_zeros(v.shape)
    final = torch.stack(states) if states else v.new_zeros(0, value_heads, key_size, value_size)
    return o, final


def _decay(g: Tensor | None, batch: int, tokens: int, value_heads: int, dtype: torch.dtype) -> Tensor | None:
    """The log decay as `[B, T, HV, K or 1, 1]`."""
    if g is None:
        return None
    g = g.to(dtype)
    if g.dim() == 1:
        g = g.expand(batch, tokens, value_heads)
    return g[..., None, None] if g.dim() == 3 else g[..., None]


def hgrn_recurrence(
    x: Tensor, g: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(g_t) h_{t-1} + x_t` for every channel (Qin et al., arXiv 2311.04823, eq. 3).

    Args:
        x, g: `[B, T, D]`.
        initial_state: `[N, D]`; zero when None.
        cu_seqlens: `[N+1]` with B = 1.

    Returns:
        h `[B, T, D]` and the final states `[N, D]`, in float64 if any input is, else in float32.
    """
    dtype = torch.float64 if torch.float64 in (x.dtype, g.dtype) else torch.float32
    x, g = x.to(dtype), g.to(dtype)
    batch, tokens, width = x.shape
    bounds = [(b, 0, tokens) for b in range(batch)]
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        bounds = [(0, first, last) for first, last in itertools.pairwise(offsets)]
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    states = []
    for n, (b, first, last) in enumerate(bounds):
        h = x.new_zeros(width) if initial_state is None else initial_state[n].to(dtype)
        for t in range(first, last):
            h = g[b, t].exp() * h + x[b, t]
            rows[b].append(h)
        states.append(h)
    stacked = [torch.stack(row) if row else x.new_zeros(0, width) for row in rows]
    if cu_seqlens is not None and stacked[0].shape[0] < tokens:
        stacked[0] = torch.cat([stacked[0], x.new_zeros(tokens - stacked[0].shape[0], width)])
    h_all = torch.stack(stacked) if stacked else x.new_zeros(x.shape)
    return h_all, torch.stack(states) if states else x.new_zeros(0, width)
