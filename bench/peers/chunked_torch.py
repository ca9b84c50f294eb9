# SPDX-License-Identifier: Apache-2.0
"""Linear attention in chunks with plain torch operators: what a user would write where no library has such code.

Same mathematics as the kernels (arXiv 2312.06635 section 4, 2406.06484 section 3), batched over heads and chunks where
that is possible, a loop over chunks for the state. It serves as a peer and is written for speed within torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 64


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Outputs [B, T, H, V] of q, k [B, T, H, K] and v [B, T, H, V].

    g: log decay [B, T, H] or [B, T, H, K]. beta [B, T, H] selects the delta rule, without it values are added.
    """
    tokens, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (_chunks(x, chunk) for x in (q * scale, k, v))
    sums = None if g is None else _chunks(g if g.dim() == 4 else g[..., None], chunk).cumsum(3)
    weight = None if beta is None else _chunks(beta[..., None], chunk)
    o = _scalar(q, k, v, sums, weight) if sums is None or sums.shape[-1] == 1 else _vector(q, k, v, sums, weight)
    return o.flatten(2, 3)[:, :, :tokens].transpose(1, 2)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] to [B, H, N, C, D], zeros behind the end."""
    x = pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(2, (-1, chunk))


def _scalar(q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None, beta: Tensor | None) -> Tensor:
    """No decay, or one number a token: all products within chunks at once, then the loop over states."""
    size = q.shape[3]
    scores, within = q @ k.mT, None
    if sums is None:
        scores = scores.tril()
        read, kept, whole = q, k, None
    else:
        mask = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
        within = (sums - sums.mT).masked_fill(~mask, float("-inf")).exp()
        scores = scores * within
        read, kept, whole = q * sums.exp(), k * (sums[..., -1:, :] - sums).exp(), sums[..., -1:, :].exp()
    if beta is not None:
        weighted = k * beta
        system = weighted @ k.mT if within is None else (weighted @ k.mT) * within
        if sums is not None:
            weighted = weighted * sums.exp()
        solved = torch.linalg.solve_triangular(
            system, torch.cat((v * beta, weighted), -1), upper=False, unitriangular=True
        )
        v, erase = solved.split((v.shape[-1], k.shape[-1]), -1)
    state, outputs = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]), []
    for i in range(q.shape[2]):
        new = v[:, :, i] if beta is None else v[:, :, i] - erase[:, :, i] @ state
        outputs.append(read[:, :, i] @ state + scores[:, :, i] @ new)
        state = (state if whole is None else state * whole[:, :, i]) + kept[:, :, i].mT @ new
    return torch.stack(outputs, 2)


def _vector(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, beta: Tensor | None) -> Tensor:
    """A decay per channel: it sits inside the dot products, so scores are formed chunk by chunk."""
    size = q.shape[3]
    mask = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()[..., None]
    read, kept, whole = q * sums.exp(), k * (sums[..., -1:, :] - sums).exp(), sums[..., -1, :, None].exp()
    state, outputs = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]), []
    for i in range(q.shape[2]):
        within = sums[:, :, i, :, None] - sums[:, :, i, None]
        pairs = within.masked_fill(~mask, float("-inf")).exp() * k[:, :, i, None]
        scores = torch.einsum("bhik,bhijk->bhij", q[:, :, i], pairs)
        new = v[:, :, i]
        if beta is not None:
            system = torch.einsum("bhik,bhijk->bhij", k[:, :, i] * beta[:, :, i], pairs)
            error = new - (k[:, :, i] * sums[:, :, i].exp()) @ state
            new = torch.linalg.solve_triangular(system, error * beta[:, :, i], upper=False, unitriangular=True)
        outputs.append(read[:, :, i] @ state + scores @ new)
        state = state * whole[:, :, i] + kept[:, :, i].mT @ new
    return torch.stack(outputs, 2)


def chunked_hgrn(x: Tensor, g: Tensor, chunk: int = CHUNK) -> Tensor:
    """h_t = exp(g_t) h_{t-1} + x_t over [B, T, D]: within a chunk by the matrix of decays, channel by channel."""
    tokens = x.shape[1]
    x, g = (pad(a, (0, 0, 0, -tokens % chunk)).unflatten(1, (-1, chunk)) for a in (x, g))
    sums = g.cumsum(2)
    mask = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()[..., None]
    state, outputs = x.new_zeros(x.shape[0], 1, x.shape[-1]), []
    for i in range(x.shape[1]):
        within = (sums[:, i, :, None] - sums[:, i, None]).masked_fill(~mask, float("-inf")).exp()
        h = (within * x[:, i, None]).sum(2) + sums[:, i].exp() * state
        outputs.append(h)
        state = h[:, -1:]
    return torch.stack(outputs, 1).flatten(1, 2)[:, :tokens]
