# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention over the last ``window`` positions, at a cost linear in the length, and its memory.

A query sees itself and the window - 1 positions before it. Libraries differ by one here; this is what ours means.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

_NAMES = ("window_keys", "window_values", "window_real")


class State(Protocol):
    """What earlier positions left in a layer, by name (:class:`tilewright.linearize.cache.StateLayer`)."""

    def get(self, name: str) -> Tensor | None:
        """A tensor with the batch first, or None before it is put."""

    def put(self, tokens: int, **tensors: Tensor) -> None:
        """Exchange tensors after ``tokens`` more positions."""


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float | None = None, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o_i = sum_j softmax_j(scale q_i . k_j) v_j over i - window < j <= i.

    Args:
        q: [B, T, H, D]: the last T of the L positions that k and v hold.
        k, v: [B, L, H_kv, D] and [B, L, H_kv, V]; H is a multiple of H_kv, and no key is copied for its query heads.
        scale: D^-1/2 unless given.
        real: bool [B, L], False where there is no key; None: everywhere. A query without any key gets a finite value
            of no meaning.

    Returns:
        o [B, T, H, V] and log sum_j exp(scale q_i . k_j) [B, T, H], in float32 (float64 for float64 inputs).

    Raises:
        ValueError: window < 1, shapes that do not fit, fewer keys than queries.
    """
    if window < 1:
        raise ValueError(f"window = {window}; at least 1 is needed (a query sees itself)")
    tokens, heads, dim = q.shape[1:]
    if k.shape[:3] != v.shape[:3] or k.shape[3] != dim or heads % k.shape[2] or k.shape[1] < tokens:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: [B, T, H, D], [B, L, H_kv, D] "
            "and [B, L, H_kv, V] are needed, L >= T and H a multiple of H_kv"
        )
    kind = torch.promote_types(q.dtype, torch.float32)
    q = q.to(kind) * (dim**-0.5 if scale is None else scale)
    reach = max(0, k.shape[1] - tokens - window + 1)
    k, v = k[:, reach:].to(kind), v[:, reach:].to(kind)
    real = None if real is None else real[:, reach:]
    if not tokens:
        return v.new_zeros(len(q), 0, heads, v.shape[3]), v.new_zeros(len(q), 0, heads)
    # Few queries are one block over all keys that they reach.
    return _blocks(q, k, v, real, min(tokens, window), window)


def _blocks(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, block: int, window: int) -> tuple[Tensor, Tensor]:
    """Blocks of ``block`` queries over their keys, span = block + window - 1 of them (fewer if there are no more)."""
    batch, tokens, heads, dim = q.shape
    kv_heads, past = k.shape[2], k.shape[1] - tokens
    groups, count = heads // kv_heads, -(-tokens // block)
    before = min(window - 1, past) if count == 1 else window - 1
    span, front, behind = before + block, before - past, count * block - tokens
    if real is None and (front or behind):
        real = torch.ones(1, k.shape[1], dtype=torch.bool, device=k.device)
    if front or behind:
        k, v = (functional.pad(x, (0, 0, 0, 0, front, behind)) for x in (k, v))
        q = functional.pad(q, (0, 0, 0, 0, 0, behind))
        real = None if real is None else functional.pad(real, (front, behind))
    # [B, n, H_kv, G * block, D] against [B, n, H_kv, D, span]
    rows = q.view(batch, count, block, kv_heads, groups, dim).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)
    scores = (rows @ k.unfold(1, span, block)).unflatten(3, (groups, block))
    distance = torch.arange(block, device=q.device)[:, None] + before - torch.arange(span, device=q.device)
    closed = (distance < 0) | (distance >= window)
    if real is not None:
        closed = closed | ~real.unfold(1, span, block)[:, :, None, None, None]
    scores = scores.masked_fill(closed, torch.finfo(scores.dtype).min)
    out = scores.softmax(-1).flatten(3, 4) @ v.unfold(1, span, block).transpose(-1, -2)
    out = out.unflatten(3, (groups, block)).permute(0, 1, 4, 2, 3, 5).reshape(batch, count * block, heads, -1)
    total = scores.logsumexp(-1).permute(0, 1, 4, 2, 3).reshape(batch, count * block, heads)
    return out[:, :tokens], total[:, :tokens]


def remember(
    state: State | None, k: Tensor, v: Tensor, real: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of the window before this call and of this call; the state then holds the last window - 1.

    Args:
        state: of the layer; None: the text begins here and is not continued.
        k, v: [B, T, H_kv, D], rotated.
        real: bool [B, T], False at padding, which must precede the row's tokens; None: no padding.

    Returns:
        k, v [B, L, H_kv, D] and real [B, L] or None, for :func:`window_attention`. Rows stay contiguous: padding,
        wherever it came from, is in front.
    """
    if state is None:
        return k, v, real
    held = [state.get(name) for name in _NAMES]
    present = real if real is not None else torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    if held[0] is not None and held[1] is not None and held[2] is not None:
        k, v = torch.cat([held[0].to(k), k], 1), torch.cat([held[1].to(v), v], 1)
        present = torch.cat([held[2].to(present.device), present], 1)
    if not bool(present.all()):
        order = padding_first(present)
        if order is not None:
            k, v, present = (take(x, order) for x in (k, v, present))
        real = present
    cut = max(0, k.shape[1] - window + 1)
    state.put(0, **dict(zip(_NAMES, (k[:, cut:].clone(), v[:, cut:].clone(), present[:, cut:].clone()), strict=True)))
    return k, v, real


def padding_first(real: Tensor) -> Tensor | None:
    """Order int64 [B, T] that puts each row's padding before its tokens and keeps theirs; None: it is so already."""
    if not bool((real[:, :-1] & ~real[:, 1:]).any()):
        return None
    return real.to(torch.uint8).argsort(dim=1, stable=True)


def take(x: Tensor, order: Tensor) -> Tensor:
    """Positions of x [B, T, ...] in ``order`` [B, T]."""
    index = order.view(*order.shape, *([1] * (x.dim() - 2)))
    return x.gather(1, index.expand(*order.shape, *x.shape[2:]))


def put_back(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of :func:`take`."""
    return take(x, order.argsort(dim=1))
