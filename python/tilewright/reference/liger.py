# SPDX-License-Identifier: Apache-2.0
"""Liger attention by its definition: a loop over tokens and a banded softmax over all pairs (arXiv 2503.01496).

Gated slot attention as in Zhang et al., arXiv 2409.07146, eq. 5-6.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def liger(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Tensor,
    *,
    variant: str = "gla",
    window: int = 64,
    alpha: float = 0.5,
    beta: float = 0.5,
    normalizer: float = 16.0,
    slots: int | None = None,
    normalize: bool = False,
) -> Tensor:
    """alpha times the recurrence (no positions) plus beta times the banded softmax (rotary).

    Args:
        q: [B, T, H, D]; k, v: [B, T, H_kv, D].
        angles: rotary angles [T, D/2].
        slots: groups whose mean is the gate logit; None: every channel is its own.

    Returns:
        [B, T, H, D].
    """
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    f = k if slots is None else torch.stack([part.mean(-1) for part in k.chunk(slots, dim=-1)], dim=-1)
    if variant != "gsa" and slots is not None:
        f = torch.cat([f[..., i : i + 1].expand(*f.shape[:-1], k.shape[-1] // slots) for i in range(slots)], dim=-1)
    rows = [
        torch.stack([_recur(q[b, :, h], k[b, :, h], v[b, :, h], f[b, :, h], variant, normalizer, normalize)
                     for h in range(q.shape[2])], dim=1)
        for b in range(q.shape[0])
    ]  # fmt: skip
    return alpha * torch.stack(rows) + beta * banded_softmax(_turn(q, angles), _turn(k, angles), v, window)


def _recur(q: Tensor, k: Tensor, v: Tensor, f: Tensor, variant: str, normalizer: float, normalize: bool) -> Tensor:
    """One head: q, k, v [T, D], f [T, D] or [T, m]; to [T, D]."""
    out = []
    keys = torch.zeros(f.shape[1], k.shape[1], dtype=q.dtype)
    values = torch.zeros(f.shape[1], v.shape[1], dtype=q.dtype)
    total = torch.zeros(f.shape[1], dtype=q.dtype)
    for t in range(q.shape[0]):
        gate = torch.sigmoid(f[t]) if variant == "hgrn2" else torch.sigmoid(f[t]) ** (1.0 / normalizer)
        if variant == "gsa":
            keys = gate[:, None] * keys + torch.outer(1 - gate, k[t])
            values = gate[:, None] * values + torch.outer(1 - gate, v[t])
            out.append(torch.softmax(keys @ q[t], 0) @ values)
            continue
        key = 1 - torch.sigmoid(f[t]) if variant == "hgrn2" else torch.softmax(k[t], 0)
        query = torch.softmax(q[t], 0)
        values = gate[:, None] * values + torch.outer(key, v[t])
        total = gate * total + key
        out.append(query @ values / (query @ total if normalize else 1.0))
    return torch.stack(out) if out else v[:0]


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + D/2) of x [B, T, H, D] by angles [T, D/2]: complex multiplication."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def banded_softmax(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention [B, T, H, D] over j in (i - window, i], from the whole [T, T] matrix."""
    tokens = q.shape[1]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill((j > i) | (j <= i - window), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", functional.softmax(scores, -1), v)
