# SPDX-License-Identifier: Apache-2.0
"""Lightning Attention: linear attention whose decay is a constant of the head (arXiv 2401.04658).

Kernel: csrc/ops/linear_attention.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tilewright.ops.linear_attention import Mode, linear_attention, linear_attention_step_


def lightning_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor | float | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """`S <- exp(-s) S + k v^T`, `o = scale S^T q` (Qin et al., arXiv 2401.04658, algorithms 1 and 2).

    The state is the recurrence's own S_t; the paper's kernels keep it decayed by one more step.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`, HV a multiple of H.
        s: slopes, at least 0: one number, `[HV]` or `[HV, 1, 1]`; None for no decay.
        scale: of q.
        initial_state, output_final_state, cu_seqlens: as in :func:`tilewright.ops.chunk_gla`.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final states `[N, HV, K, V]` or None.

    Raises:
        ValueError: a slope is negative or not a number, or s has another shape.
        RuntimeError: a shape, dtype or device does not fit.
    """
    return linear_attention(
        q,
        k,
        v,
        g=_log_decay(s, v.shape[2]),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        mode=mode,
    )


def _log_decay(s: Tensor | float | None, heads: int) -> Tensor | None:
    if s is None:
        return None
    slopes = torch.as_tensor(s)
    slopes = slopes if slopes.dtype == torch.float64 else slopes.float()
    if slopes.numel() not in (1, heads) or any(size not in (1, heads) for size in slopes.shape):
        raise ValueError(
            f"lightning_attn_func: s has shape {list(slopes.shape)}, needed one number or [HV] = [{heads}]"
        )
    if not torch.compiler.is_compiling() and not bool((slopes >= 0).all()):
        raise ValueError(
            "lightning_attn_func: s holds a negative slope or NaN; the decay is exp(-s), so s must be >= 0"
        )
    return -slopes.reshape(-1).expand(heads)


def lightning_attn_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor | float | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One step for every sequence of a batch, states updated in place. No gradient.

    Args:
        q, k: `[B, T, H, K]`, T usually 1.
        v: `[B, T, HV, V]`.
        s, scale: as in :func:`lightning_attn_func`.
        state: float32 `[P, HV, K, V]`, a pool of states; sequence b uses row state_indices[b], or row b.
        state_indices: int64 `[B]`, each row of the pool at most once.

    Returns:
        o `[B, T, HV, V]`.
    """
    return linear_attention_step_(q, k, v, state, g=_log_decay(s, v.shape[2]), scale=scale, state_indices=state_indices)


def build_slope_tensor(
    num_heads: int,
    layer_idx: int | None = None,
    num_layers: int | None = None,
    kind: Literal["alibi", "linear"] = "alibi",
) -> Tensor:
    """Slopes s_h of the heads, float32 `[H]`; the decay of head h is exp(-s_h).

    kind "alibi": `2^(-8 (h+1) / H)` for H a power of two; otherwise those of the largest power of two P below, then
    every second one of 2P. With a layer, times `1 - l / (L - 1) + 1e-5` (TransNormerLLM, MiniMax).
    kind "linear": `8 h / H`, with a layer times `1 - l / L` (flash-linear-attention); head 0 does not decay.

    Raises:
        ValueError: num_heads < 1, an unknown kind, or only one of layer_idx and num_layers.
    """
    if num_heads < 1:
        raise ValueError(f"build_slope_tensor: num_heads = {num_heads}, needed at least 1")
    if (layer_idx is None) != (num_layers is None):
        raise ValueError("build_slope_tensor: layer_idx and num_layers go together; one of them is None")
    if kind == "alibi":
        slopes = torch.tensor(_alibi(num_heads), dtype=torch.float64)
        factor = 1.0 if layer_idx is None or num_layers is None else 1 - layer_idx / max(num_layers - 1, 1) + 1e-5
    elif kind == "linear":
        slopes = 8.0 / num_heads * torch.arange(num_heads, dtype=torch.float64)
        factor = 1.0 if layer_idx is None or num_layers is None else 1 - layer_idx / num_layers
    else:
        raise ValueError(f"build_slope_tensor: kind = {kind!r}, needed 'alibi' or 'linear'")
    return (slopes * factor).float()


def _alibi(heads: int) -> list[float]:
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    return slopes if power == heads else slopes + _alibi(2 * power)[::2][: heads - power]


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """:func:`lightning_attn_func` as flash-linear-attention spells it: linear slopes of a layer, scale K^-1/2."""
    slopes = build_slope_tensor(v.shape[2], layer_idx, num_layers, kind="linear")
    return lightning_attn_func(
        q,
        k,
        v,
        slopes,
        scale=max(q.shape[-1], 1) ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        mode=mode,
    )


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_lightning_attn` token by token: the form for decoding."""
    return chunk_lightning_attn(
        q, k, v, layer_idx, num_layers, scale, initial_state, output_final_state, cu_seqlens, mode="recurrent"
    )
