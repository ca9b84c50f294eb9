# SPDX-License-Identifier: Apache-2.0
"""Additive linear attention with any decay: none, a constant or a gate per head, a gate per channel.

Signatures and layouts are those of flash-linear-attention. Kernel: csrc/ops/linear_attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.ops.linear_attention import Mode, linear_attention

# A normaliser of 0 comes with a numerator of 0; the quotient shall be 0.
_EPS = 1e-10


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention: `S <- diag(exp(g_t)) S + k v^T`, `o = scale S^T q` (arXiv 2312.06635, eq. 3).

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`, HV a multiple of H.
        g: `[B, T, HV, K]`, natural logarithm of the decay, at most 0.
        scale: of q; K^-1/2 when None.
        initial_state: `[N, HV, K, V]`; zero when None.
        output_final_state: return the states after the last tokens.
        cu_seqlens: int64 or int32 `[N+1]` with B = 1: offsets of packed sequences.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final states `[N, HV, K, V]` or None.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return linear_attention(
        q,
        k,
        v,
        g=g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        mode=mode,
    )


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_gla` token by token: the form for decoding. gk None: no decay."""
    return linear_attention(
        q,
        k,
        v,
        g=gk,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        mode="recurrent",
    )


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a scalar decay: `S <- exp(g_t) S + k v^T` (Mamba-2, arXiv 2405.21060, section 5).

    Args:
        q, k, v, scale, initial_state, output_final_state, cu_seqlens: as in :func:`chunk_gla`.
        g: `[B, T, HV]`, natural logarithm of each token's decay.
        g_gamma: `[HV]`, a constant part of it; both may be given, or neither.
    """
    if g_gamma is not None and g is not None:
        g = g + g_gamma.to(g.dtype)
    return linear_attention(
        q,
        k,
        v,
        g=g_gamma if g is None else g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        mode=mode,
    )


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_simple_gla` token by token: the form for decoding."""
    return chunk_simple_gla(q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens, mode="recurrent")


def retention_decay(num_heads: int) -> Tensor:
    """log gamma_h with `gamma_h = 1 - 2^(-5-h)`, float32 `[H]` (RetNet, arXiv 2307.08621, eq. 8)."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads, dtype=torch.float64))).float()


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """Retention: :func:`chunk_simple_gla` with the decays of :func:`retention_decay` (arXiv 2307.08621, eq. 6)."""
    return chunk_simple_gla(
        q, k, v, None, retention_decay(v.shape[2]), scale, initial_state, output_final_state, cu_seqlens, mode=mode
    )


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_retention` token by token: the form for decoding."""
    return chunk_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens, mode="recurrent")


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    *,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention without decay (Katharopoulos et al., arXiv 2006.16236, eqs. 10-12).

    Args:
        q, k, v, scale, output_final_state, cu_seqlens: as in :func:`chunk_gla`; q and k after their feature map.
        initial_state: `[N, HV, K, V]`, with normalize `[N, HV, K, V+1]`: the sum of the keys is the last column.
        normalize: divide by `q . sum_s k_s`. The sum runs through the same kernel, as a column of ones beside v.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final states, of the shape of initial_state, or None.
    """
    if not normalize:
        return linear_attention(
            q,
            k,
            v,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            mode=mode,
        )
    # The quotient is formed before anything is rounded to a narrow dtype.
    wide = v if v.dtype == torch.float64 else v.float()
    o, state = linear_attention(
        q,
        k,
        F.pad(wide, (0, 1), value=1.0),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        mode=mode,
    )
    return (o[..., :-1] / (o[..., -1:] + _EPS)).to(v.dtype), state


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_linear_attn` token by token: the form for decoding."""
    return chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens, mode="recurrent")
