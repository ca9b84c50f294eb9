# SPDX-License-Identifier: Apache-2.0
"""Mixture of memories, token by token: the definition that the packed form is measured against.

Plain torch, so that autograd gives the oracle of the gradients too; float64 where the inputs are. It shares no code
with :mod:`tilewright.nn.mom` or the operators.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def memory_step(state: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> Tensor:
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
    o = (
        torch.stack(outputs).unflatten(0, (batch, tokens))
        if outputs
        else v.new_zeros(batch, tokens, heads, v.shape[-1])
    )
    return o, torch.stack(finals)


def mom_layer(
    x: Tensor,
    weights: Mapping[str, Tensor],
    *,
    num_heads: int,
    topk: int,
    op: str = "gated_delta_rule",
    shared: bool = True,
    norm_eps: float = 1e-5,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole layer, one token and one memory after another (arXiv 2502.13685, section 3).

    Every memory keeps the last inputs of its own short convolution. The always-on memory is the last one.

    Args:
        x: `[B, T, D]`.
        weights: by the parameter names of :class:`tilewright.nn.MomAttention`; without ``conv.weight`` SiLU alone, with
            two-dimensional ``k_proj.weight`` all memories share their projections.
        op: as in :func:`tilewright.nn.mom.mom_attention`.
        attention_mask: `[B, T]`, 0 for padding, which writes nothing and gives 0.

    Returns:
        out `[B, T, D]` and the final states `[B, M, H, K, V]`, the always-on memory last.
    """
    outputs, finals = [], []
    for b in range(x.shape[0]):
        memories = _Memories(weights, num_heads, op, shared)
        for t in range(x.shape[1]):
            if attention_mask is not None and not attention_mask[b, t]:
                outputs.append(torch.zeros_like(x[b, t]))
                continue
            # Python's sort is stable in reverse too: of equal probabilities the lower index comes first.
            p = torch.softmax(weights["router.weight"] @ x[b, t], 0)
            chosen = sorted(range(p.numel()), key=p.tolist().__getitem__, reverse=True)[:topk]
            shares = p[chosen] / p[chosen].sum()
            read = torch.stack(
                [share * memories.step(m, x[b, t]) for share, m in zip(shares, chosen, strict=True)]
            ).sum(0)
            if shared:
                read = read + memories.step(p.numel(), x[b, t])
            gate = (weights["g_proj.weight"] @ x[b, t]).unflatten(0, (num_heads, -1))
            scaled = read * torch.rsqrt((read * read).mean(-1, keepdim=True) + norm_eps) * weights["o_norm.weight"]
            outputs.append(weights["o_proj.weight"] @ (scaled * gate * torch.sigmoid(gate)).flatten())
        finals.append(torch.stack(memories.states))
    out = torch.stack(outputs).unflatten(0, x.shape[:2]) if outputs else torch.zeros_like(x)
    return out, torch.stack(finals)


class _Memories:
    """The states of one sequence's memories and the last inputs of their convolutions."""

    def __init__(self, weights: Mapping[str, Tensor], heads: int, op: str, shared: bool) -> None:
        self.weights, self.heads, self.op = weights, heads, op
        count = weights["router.weight"].shape[0] + shared
        key_size, value_size = self._of("q_proj", 0).shape[0] // heads, self._of("v_proj", 0).shape[0] // heads
        self.states = [weights["q_proj.weight"].new_zeros(heads, key_size, value_size) for _ in range(count)]
        self.past: list[list[Tensor]] = [[] for _ in range(count)]

    def _of(self, name: str, m: int) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return weight[m] if weight.dim() == 3 else weight

    def step(self, m: int, x: Tensor) -> Tensor:
        """Write x to memory m and read it: `scale S^T q`, `[H, V]`."""
        q, k, v = self._convolved(m, [self._of(f"{name}_proj", m) @ x for name in ("q", "k", "v")])
        beta = torch.sigmoid(self._of("b_proj", m) @ x) if "delta" in self.op else None
        if beta is not None:
            q, k = (y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        self.states[m] = memory_step(self.states[m], k, v, self._decay(m, x), beta)
        return q.shape[-1] ** -0.5 * torch.einsum("hkv,hk->hv", self.states[m], q)

    def _convolved(self, m: int, streams: list[Tensor]) -> list[Tensor]:
        y = torch.cat(streams)
        if "conv.weight" in self.weights:
            past = self.past[m]
            past.append(y)
            taps = self.weights["conv.weight"][:, 0]
            y = torch.stack([taps[:, -1 - lag] * past[-1 - lag] for lag in range(min(taps.shape[1], len(past)))]).sum(0)
        y = y * torch.sigmoid(y)
        return [part.unflatten(0, (self.heads, -1)) for part in y.split([x.shape[0] for x in streams])]

    def _decay(self, m: int, x: Tensor) -> Tensor | None:
        if self.op == "gated_delta_rule":
            logits = self._of("a_proj", m) @ x + self.weights["dt_bias"]
            return -self.weights["A_log"].exp() * torch.nn.functional.softplus(logits)
        if self.op == "gla":
            bias = self.weights["gk_up_proj.bias"]
            logits = self._of("gk_up_proj", m) @ (self._of("gk_down_proj", m) @ x) + (
                bias[m] if bias.dim() == 2 else bias
            )
            return (torch.nn.functional.logsigmoid(logits) / 16).unflatten(0, (self.heads, -1))
        return None
