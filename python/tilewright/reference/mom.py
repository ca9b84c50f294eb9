# SPDX-License-Identifier: Apache-2.0
"""Mixture of memories, token by token: the definition that the packed form is measured against.

Plain torch, so that autograd gives the oracle of the gradients too; float64 where the inputs are. It shares no code
with :mod:`tilewright.nn.mom` or the operators.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_step(
    state: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None
) -> Tensor:
    """One write to one memory: decay, then the delta rule where there is a beta, else the plain sum.

    `S <- exp(g) S`, `S <- S + k (beta (v - S^T k))^T` or `S <- S + k v^T`.

    state: `[H, K, V]`. k: `[H, K]`. v: `[H, V]`. g: `[H]`, `[H, K]` or None. beta: `[H]` or None.
    """
    if g is not None:
        decay = g.exp()
        state = state * (decay[:, None, None] if decay.dim() == 1 else decay[:, :, None])
    if beta is not None:
        v = beta[:, None] * (v - torch.einsum("hkv,hk->hv", state, k))
    return state + k[:, :, None] * v[:, None, :]


def mixture_of_memories(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    num_memories: int,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`o_t = sum_j w_tj scale (S^{m_j}_t)^T q_t` with one state a memory, written by its own tokens (arXiv 2502.13685).

    The states are mixed first and read once, as the paper writes it (eq. 7); the packed form mixes the reads.

    Args:
        q: `[B, T, H, K]`, or `[B, T, k, H, K]`, one query a slot.
        k, v, g, beta: `[B, T, k, H, ...]`; g and beta may be None.
        weights, indices: `[B, T, k]`; index -1 writes nothing and reads zero.
        num_memories: M.
        scale: of q; K^-1/2 when None.
        initial_state: `[B, M, H, K, V]`; zero when None.

    Returns:
        o `[B, T, H, V]` and the final states `[B, M, H, K, V]`.
    """
    batch, tokens, slots, heads, key_size = k.shape
    scale = key_size**-0.5 if scale is None else scale
    outputs, finals = [], []
    for b in range(batch):
        states = [v.new_zeros(heads, key_size, v.shape[-1]) for _ in range(num_memories)]
        if initial_state is not None:
            states = list(initial_state[b])
        for t in range(tokens):
            read = v.new_zeros(heads, v.shape[-1])
            mixed = torch.zeros_like(states[0])
            for j in range(slots):
                m = int(indices[b, t, j])
                if m < 0:
                    continue
                gate = None if g is None else g[b, t, j]
                write = None if beta is None else beta[b, t, j]
                states[m] = memory_step(states[m], k[b, t, j], v[b, t, j], gate, write)
                if q.dim() == 4:
                    mixed = mixed + weights[b, t, j] * states[m]
                else:
                    read = read + weights[b, t, j] * torch.einsum("hkv,hk->hv", states[m], q[b, t, j])
            if q.dim() == 4:
                read = torch.einsum("hkv,hk->hv", mixed, q[b, t])
            outputs.append(scale * read)
        finals.append(torch.stack(states))
    o = torch.stack(outputs).unflatten(0, (batch, tokens)) if outputs else v.new_zeros(batch, tokens, heads, v.shape[-1])
    return o, torch.stack(finals)
