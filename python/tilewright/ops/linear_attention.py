# SPDX-License-Identifier: Apache-2.0
"""Linear attention with a matrix state: one engine for every rule and decay. Kernel: csrc/ops/linear_attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["additive", "delta"]
Mode = Literal["chunk", "recurrent"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    rule: Rule = "additive",
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    from tilewright.reference.linear_attention import recurrence

    o, state = recurrence(
        q, k, v, beta=beta, g=g, rule=rule, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    return o.to(v.dtype), state if output_final_state else None


def state_transition(
    k: Tensor,
    *,
    v: Tensor | None = None,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    rule: Rule = "additive",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The affine map of states that a segment of tokens is: `S -> M S + B`.

    The columns of a state evolve independently, so one pass over the tokens from the state `[0, I]` with the values
    `[v, 0]` gives B and M side by side.

    Args:
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`; None for V = 0.
        beta, g, rule, cu_seqlens: as in :func:`linear_attention`.

    Returns:
        M `[N, HV, K, K]` and B `[N, HV, K, V]`, float32 (float64 for float64 inputs).
    """
    batch, tokens, heads, key_size = k.shape
    value_heads = v.shape[2] if v is not None else beta.shape[2] if beta is not None else heads
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    values = k.new_zeros(batch, tokens, value_heads, key_size)
    identity = torch.eye(key_size, dtype=wide).expand(sequences, value_heads, key_size, key_size)
    if v is not None:
        values = torch.cat([v.to(k.dtype), values], dim=-1)
        identity = torch.cat([identity.new_zeros(sequences, value_heads, key_size, v.shape[-1]), identity], dim=-1)
    _, state = linear_attention(
        k,
        k,
        values,
        beta=beta,
        g=g,
        rule=rule,
        scale=1.0,
        initial_state=identity,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    assert state is not None
    return state[..., -key_size:], state[..., :-key_size]
