# SPDX-License-Identifier: Apache-2.0
"""Linear attention with feature maps, alone or beside a softmax window (arXiv 2402.04347; window: 2410.10254)."""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.nn.hedgehog.feature_maps import apply_feature_map
from tilewright.ops import chunk_linear_attn, fused_recurrent_linear_attn

Mode = Literal["chunk", "recurrent"]
EPS = 1e-12


def hedgehog_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    phi_q: nn.Module,
    phi_k: nn.Module,
    causal: bool = True,
    normalize: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = EPS,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """Attention whose weights are products of features (arXiv 2402.04347, eq. 2 and 3), in time linear in T.

    ``a_ij = phi_q(q_i) . phi_k(k_j) / (sum_m phi_q(q_i) . phi_k(k_m) + eps)``, ``o_i = sum_j a_ij v_j``, the sums over
    j <= i when causal, else over all. The numerator and the denominator come from one state, v having a column of ones.

    Args:
        q: ``[B, T, H, D]``, after rotary embedding where the model has it. No scale is applied.
        k: ``[B, S, Hk, D]`` with H a multiple of Hk; S = T when causal.
        v: ``[B, S, Hk, V]``.
        phi_q, phi_k: modules from ``[..., heads, D]`` to ``[..., heads, F]``. phi_k with ``num_heads == H`` sees keys
            once for each query head, otherwise once.
        causal: read j <= i; otherwise every key.
        normalize: divide by the denominator.
        initial_state: ``[N, H, F, V+1]``, what earlier keys left (last column: the sum of their features).
        output_final_state: return the state after the last key.
        attention_mask: ``[B, S]``, 0 (or False) where a key is padding: its features become 0.
        cu_seqlens: ``[N+1]`` with B = 1, offsets of packed sequences (the same for q and k).
        eps: added to the denominator; a row without a visible key gives 0.
        mode: "chunk" or "recurrent" (token by token, for decoding), when causal.

    Returns:
        o ``[B, T, H, V]`` in the dtype of v, and the state float32 (float64 for float64 inputs) or None.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(q, k, v, attention_mask, causal)
    heads = q.shape[2]
    features_q = apply_feature_map(phi_q, q, heads)
    features_k = masked_features(apply_feature_map(phi_k, k, heads), attention_mask)
    values = with_ones(repeat_heads(v, heads), features_k.dtype)
    if causal:
        run = chunk_linear_attn if mode == "chunk" else fused_recurrent_linear_attn
        o, state = run(
            features_q,
            features_k,
            values,
            1.0,
            initial_state,
            output_final_state,
            normalize=False,
            cu_seqlens=cu_seqlens,
        )
    else:
        o, state = _bidirectional(features_q, features_k, values, initial_state, cu_seqlens)
    o = o[..., :-1] / (o[..., -1:] + eps) if normalize else o[..., :-1]
    return o.to(v.dtype), state if output_final_state else None


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every query reads the sum over all keys of its sequence: o [B, T, H, V], states [N, H, F, V]."""
    if cu_seqlens is None:
        state = torch.einsum("bshf,bshv->bhfv", k, v)
        state = state if initial_state is None else state + initial_state
        return torch.einsum("bthf,bhfv->bthv", q, state), state
    outputs, states = [], []
    offsets = cu_seqlens.tolist()
    for n, (first, last) in enumerate(itertools.pairwise(offsets)):
        start = None if initial_state is None else initial_state[n : n + 1]
        o, state = _bidirectional(q[:, first:last], k[:, first:last], v[:, first:last], start, None)
        outputs.append(o)
        states.append(state)
    rest = v.new_zeros(1, q.shape[1] - offsets[-1], *v.shape[2:])
    return torch.cat([*outputs, rest], 1), torch.cat(states)


class WindowState(NamedTuple):
    """What windowed attention keeps of the past; its size does not depend on how much past there is.

    state: ``[B, H, F, V+1]``, sums over keys that left the window. key ``[B, w, Hk, D]``, value ``[B, w, Hk, V]``,
    real bool ``[B, w]``: the last w tokens, oldest first, and which of them exist.
    """

    state: Tensor
    key: Tensor
    value: Tensor
    real: Tensor

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, heads: int, feature_size: int, window: int) -> WindowState:
        """Before the first token, for k [B, T, Hk, D] and v [B, T, Hk, V]."""
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        batch = k.shape[0]
        return cls(
            k.new_zeros(batch, heads, feature_size, v.shape[-1] + 1, dtype=dtype),
            k.new_zeros(batch, window, *k.shape[2:]),
            v.new_zeros(batch, window, *v.shape[2:]),
            torch.zeros(batch, window, dtype=torch.bool, device=k.device),
        )


def windowed_hedgehog_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    phi_q: nn.Module,
    phi_k: nn.Module,
    mix: Tensor,
    window: int,
    scale: float | None = None,
    past: WindowState | None = None,
    output_final_state: bool = False,
    attention_mask: Tensor | None = None,
    eps: float = EPS,
    mode: Mode = "chunk",
) -> tuple[Tensor, WindowState | None]:
    """Causal attention, softmax on the last ``window`` tokens, linear before them, one denominator (arXiv 2410.10254).

    With ``l_ij = scale q_i . k_j`` and c_i its maximum in the window, weights before the division are
    ``mix_h exp(l_ij - c_i)`` for ``i - window < j <= i`` and ``phi_q(q_i) . phi_k(k_j)`` for older keys.

    Args:
        q ``[B, T, H, D]``, k ``[B, T, Hk, D]``, v ``[B, T, Hk, V]``, phi_q, phi_k, eps, mode: as in
            :func:`hedgehog_attention`.
        mix: ``[H]``, positive.
        window: tokens in the window, the query's own included; at least 1.
        scale: of the softmax, ``D^-1/2`` unless given.
        past: what an earlier call returned; None at the start.
        output_final_state: return what the next call needs.
        attention_mask: ``[B, T]``, 0 where a token is padding; the T tokens of this call.

    Returns:
        o ``[B, T, H, V]`` in the dtype of v, and a :class:`WindowState` or None.
    """
    _check(q, k, v, attention_mask, True)
    if window < 1:
        raise ValueError(f"window={window}: at least 1 is needed (the token itself)")
    batch, tokens, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    real = torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
    real = real if attention_mask is None else attention_mask.bool()
    features_q = apply_feature_map(phi_q, q, heads)
    if past is None:
        past = WindowState.empty(k, v, heads, features_q.shape[-1], window)
    k, v = torch.cat((past.key.to(k.dtype), k), 1), torch.cat((past.value.to(v.dtype), v), 1)
    real = torch.cat((past.real, real), 1)
    # Key n of the joined sequence leaves the window as query n arrives, which then reads it after the write.
    features_k = masked_features(apply_feature_map(phi_k, k[:, :tokens], heads), real[:, :tokens])
    old = with_ones(repeat_heads(v[:, :tokens], heads), features_k.dtype)
    run = chunk_linear_attn if mode == "chunk" else fused_recurrent_linear_attn
    far, state = run(features_q, features_k, old, 1.0, past.state, output_final_state, normalize=False)
    near = _window_sums(q, k, v, real, window, scale)
    joint = far + mix.to(far.dtype)[:, None] * near.to(far.dtype)
    o = (joint[..., :-1] / (joint[..., -1:] + eps)).to(v.dtype)
    if state is None:
        return o, None
    return o, WindowState(state, k[:, tokens:], v[:, tokens:], real[:, tokens:])


def _window_sums(q: Tensor, k: Tensor, v: Tensor, real: Tensor, window: int, scale: float) -> Tensor:
    """``sum_j exp(l_ij - c_i) [v_j, 1]`` over each query's window: [B, T, H, V+1].

    k, v, real have ``window`` rows more than q, in front. Queries go in blocks of ``window``, each against its own
    and the previous block of keys, so the cost is T * 2 window.
    """
    batch, tokens, heads, dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    blocks = -(-tokens // window)
    short = blocks * window - tokens
    q, k, v = (F.pad(x.to(dtype), (0, 0, 0, 0, 0, short)) for x in (q, k, v))
    real = F.pad(real, (0, short))
    groups = heads // k.shape[2]
    # [B, blocks, Hk, G, w, D] against [B, blocks, Hk, 2w, D]
    queries = q.view(batch, blocks, window, k.shape[2], groups, dim).permute(0, 1, 3, 4, 2, 5)
    keys, values = (_pairs_of_blocks(x, window).transpose(2, 3) for x in (k, with_ones(v, dtype)))
    logits = scale * torch.einsum("bnhgid,bnhjd->bnhgij", queries, keys)
    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)[None]
    inside = (column > row) & (column <= row + window)
    seen = inside & _pairs_of_blocks(real, window)[:, :, None, None, None, :]
    logits = logits.masked_fill(~seen, -torch.inf)
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)
    sums = torch.einsum("bnhgij,bnhjv->bnihgv", (logits - top).exp(), values)
    return sums.reshape(batch, blocks * window, heads, v.shape[-1] + 1)[:, :tokens]


def _pairs_of_blocks(x: Tensor, window: int) -> Tensor:
    """[B, (n+1) w, ...] to [B, n, 2w, ...]: each block of w rows behind the one before it."""
    blocks = x.unflatten(1, (-1, window))
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), 2)


def with_ones(v: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., V] to [..., V+1]: the column of ones whose sums are the denominators."""
    return F.pad(v.to(dtype), (0, 1), value=1.0)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, Hk, ...] to [B, T, H, ...], each head for its group."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def masked_features(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features [B, T, H, F] with those of padding set to 0: after the map, whose value at 0 is not 0."""
    return features if mask is None else features.masked_fill(~mask.bool()[:, :, None, None], 0.0)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; each needs [B, T, H, D]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or (causal and q.shape[1] != k.shape[1]):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: needed q [B, T, H, D], k [B, S, Hk, D] and "
            f"v [B, S, Hk, V]{' with S = T' if causal else ''}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} heads, q has {q.shape[2]}; the heads of q must be a multiple of those of k"
        )
    if mask is not None and mask.shape != k.shape[:2]:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, needed {list(k.shape[:2])}, as the keys")
