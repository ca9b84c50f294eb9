# SPDX-License-Identifier: Apache-2.0
"""Local linear attention with every query's regression written out, and Parallax: the oracles of their kernels.

The normal equations are formed and solved densely, `[S, K]` differences and a `[K, K]` matrix for each query, in the
notation of the paper (Zuo et al., arXiv 2510.01450). Plain torch, so that autograd gives the gradients too; float64
where the inputs are. Time and memory grow with T S K^2: for small problems only.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def lla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge_lambda: float | Tensor = 1.0,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    ridge: str = "relative",
    ridge_grad: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The fitted value, at each query, of a locally weighted ridge regression of values on keys.

    For a query i over the keys j that it sees, with `w_ij = exp(scale q_i.k_j - m_i)` and `z_ij = k_j - q_i`::

        min over (b, W) of  1/2 sum_j w_ij |v_j - b - W z_ij|^2 + 1/2 r_i |W|_F^2,      o_i = b

        omega = sum_j w_j    mu = sum_j w_j z_j    Sigma = sum_j w_j z_j z_j^T + r I
        rho = Sigma^-1 mu    delta = omega - mu.rho
        o = sum_j w_j (1 - z_j.rho) v_j / delta

    Args:
        q: `[B, T, HQ, K]`.
        k: `[B, S, H, K]`, HQ a multiple of H; query head h reads key head h // (HQ / H).
        v: `[B, S, H, V]`.
        ridge_lambda: positive, broadcastable to `[B, T, HQ]`.
        scale: of the scores; K^-1/2 when None.
        causal: query i sits at position S - T + i and sees keys up to there.
        window_size: and of those only the last so many.
        ridge: "relative", r = lambda omega, or "absolute", r = lambda for weights exp(scale q.k).
        ridge_grad: False takes the factor omega of a relative ridge as a constant in the backward pass, as the
            published kernels do.
        cu_seqlens: `[N+1]` with B = 1 and S = T: offsets of packed sequences. Rows behind the last one give zeros.

    Returns:
        o `[B, T, HQ, V]`, and the statistics "omega" and "delta" `[B, T, HQ]` and "rho" `[B, T, HQ, K]`; all in float64
        if any input is, else in float32. A query that sees no key gives zeros.
    """
    q, k, v, scale = _prepared(q, k, v, scale)
    strength = torch.as_tensor(ridge_lambda, dtype=q.dtype).expand(q.shape[:3])
    o = q.new_zeros(*q.shape[:3], v.shape[-1])
    stats = {"omega": q.new_zeros(q.shape[:3]), "delta": q.new_zeros(q.shape[:3]), "rho": torch.zeros_like(q)}
    for b, first, last, key_first, key_last in _bounds(q, k, cu_seqlens):
        rows, keys = slice(first, last), slice(key_first, key_last)
        visible = visible_keys(last - first, key_last - key_first, causal, window_size)
        for head in range(q.shape[2]):
            found = _solve(
                q[b, rows, head], k[b, keys, head], v[b, keys, head], strength[b, rows, head], scale, visible,
                ridge == "absolute", ridge_grad,
            )  # fmt: skip
            at = (torch.tensor(b), torch.arange(first, last), torch.tensor(head))
            o = o.index_put(at, found[0])
            for name, value in zip(("omega", "delta", "rho"), found[1:], strict=True):
                stats[name] = stats[name].index_put(at, value)
    return o, stats


def parallax_reference(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`o = sum p v (1 + sum p s) - sum p s v` with `p = softmax(scale q.k)` and `s = r.k` (arXiv 2605.29157).

    Arguments and result as in :func:`lla_reference`; r `[B, T, HQ, K]` stands for the solution of the regression.
    """
    q, k, v, scale = _prepared(q, k, v, scale)
    r = r.to(q.dtype)
    o = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b, first, last, key_first, key_last in _bounds(q, k, cu_seqlens):
        rows, keys = slice(first, last), slice(key_first, key_last)
        visible = visible_keys(last - first, key_last - key_first, causal, window_size)
        for head in range(q.shape[2]):
            weights, _ = _weights(q[b, rows, head] @ k[b, keys, head].T * scale, visible)
            p = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
            s = r[b, rows, head] @ k[b, keys, head].T
            values = v[b, keys, head]
            row = (p @ values) * (1 + (p * s).sum(-1, keepdim=True)) - (p * s) @ values
            o = o.index_put((torch.tensor(b), torch.arange(first, last), torch.tensor(head)), row)
    return o


def visible_keys(queries: int, keys: int, causal: bool, window_size: int | None) -> Tensor:
    """Bool `[T, S]`: which keys each query sees; query i sits at position S - T + i."""
    position = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None]
    seen = key <= position if causal else torch.ones(queries, keys, dtype=torch.bool)
    return seen if window_size is None else seen & (key > position - window_size)


def _prepared(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor, float]:
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    group = q.shape[2] // max(k.shape[2], 1)
    k, v = (x.to(dtype).repeat_interleave(group, dim=2) for x in (k, v))
    return q.to(dtype), k, v, max(q.shape[-1], 1) ** -0.5 if scale is None else scale


def _bounds(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int, int, int, int]]:
    """(batch row, first and last query, first and last key) of every sequence."""
    if cu_seqlens is None:
        return [(b, 0, q.shape[1], 0, k.shape[1]) for b in range(q.shape[0])]
    offsets = cu_seqlens.tolist()
    return [(0, first, last, first, last) for first, last in itertools.pairwise(offsets)]


def _weights(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """exp(score - m) on visible keys, 0 elsewhere, and m, the largest visible score, as a constant."""
    scores = scores.masked_fill(~visible, -torch.inf)
    if scores.shape[1] == 0:
        return scores, scores.new_zeros(scores.shape[0], 1)
    m = scores.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0.0)
    return (scores - m).exp(), m


def _solve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strength: Tensor,
    scale: float,
    visible: Tensor,
    absolute: bool,
    ridge_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sequence and head: o, omega, delta, rho."""
    w, m = _weights(scale * (q @ k.T), visible)
    z = k[None] - q[:, None]
    omega = w.sum(-1)
    mu = torch.einsum("ij,ijd->id", w, z)
    factor = (-m[:, 0]).exp() if absolute else omega if ridge_grad else omega.detach()
    # A row without keys has nothing to solve: the identity keeps its matrix regular.
    r = torch.where(visible.any(-1), strength * factor, torch.ones_like(strength))
    sigma = torch.einsum("ij,ija,ijb->iab", w, z, z) + r[:, None, None] * torch.eye(q.shape[1], dtype=q.dtype)
    rho = torch.linalg.solve(sigma, mu[..., None])[..., 0]
    delta = omega - (mu * rho).sum(-1)
    numerator = w * (1 - torch.einsum("ijd,id->ij", z, rho))
    return (numerator / torch.where(visible.any(-1), delta, 1.0)[:, None]) @ v, omega, delta, rho
