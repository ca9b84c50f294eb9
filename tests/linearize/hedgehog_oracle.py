# SPDX-License-Identifier: Apache-2.0
"""Hedgehog's attention and losses with every T x T matrix written out: what the tests compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, T, Hk, D] for every query head."""
    return torch.stack([x[:, :, h * x.shape[2] // heads] for h in range(heads)], 2)


def visible(tokens: int, keys: int, causal: bool, mask: Tensor | None) -> Tensor:
    """bool [B or 1, 1, T, S]."""
    seen = torch.ones(tokens, keys, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    return seen[None, None] if mask is None else seen[None, None] & mask[:, None, None, :].bool()


def softmax_weights(
    q: Tensor, k: Tensor, *, causal: bool = True, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The teacher's p [B, H, T, S]; rows without a visible key are 0."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bihd,bjhd->bhij", q, repeated(k, q.shape[2]))
    seen = visible(q.shape[1], k.shape[1], causal, mask)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0).nan_to_num(0.0)


def student_weights(
    q: Tensor,
    k: Tensor,
    phi_q: Any,
    phi_k: Any,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    window: int | None = None,
    mix: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """The student's a [B, H, T, S]."""
    heads = q.shape[2]
    own = getattr(phi_k, "num_heads", None) == heads
    keys = phi_k(repeated(k, heads)) if own else repeated(phi_k(k), heads)
    seen = visible(q.shape[1], k.shape[1], causal, mask)
    products = torch.einsum("bihf,bjhf->bhij", phi_q(q), keys)
    if window is not None:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        logits = scale * torch.einsum("bihd,bjhd->bhij", q, repeated(k, heads))
        place = torch.arange(q.shape[1])
        near = seen & (place[:, None] - place[None] < window)
        top = logits.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
        top = top.masked_fill(top.isinf(), 0.0)
        products = torch.where(near, mix[:, None, None] * (logits - top).exp(), products)
    products = products.masked_fill(~seen, 0.0)
    return products / (products.sum(-1, keepdim=True) + eps)


def output(weights: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, V]."""
    return torch.einsum("bhij,bjhv->bihv", weights, repeated(v, weights.shape[1]))


def loss(p: Tensor, a: Tensor, kind: str, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The mean over rows of real tokens that see two keys or more."""
    if kind == "mse":
        rows = (output(p, v) - output(a, v)).square().mean(-1).transpose(1, 2)
    else:
        rows = -(p * a.clamp_min(1e-12).log()).sum(-1)
        rows = rows + torch.special.xlogy(p, p).sum(-1) if kind == "kl" else rows
    keys = visible(p.shape[2], p.shape[3], causal, mask).sum(-1).expand(p.shape[0], 1, -1)
    real = torch.ones(p.shape[0], 1, p.shape[2], dtype=torch.bool) if mask is None else mask[:, None, :].bool()
    counted = (real & (keys >= 2)).expand(rows.shape)
    return rows[counted].mean()
