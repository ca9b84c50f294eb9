# SPDX-License-Identifier: Apache-2.0
"""The delta rule: plain, gated by a scalar, gated by channel (arXiv 2406.06484, 2412.06464, 2510.26692).

Signatures and layouts are those of flash-linear-attention. Kernel: csrc/ops/linear_attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.ops.linear_attention import Mode, linear_attention, linear_attention_step_


def l2_normalize(x: Tensor) -> Tensor:
    """`x / sqrt(sum(x^2) + 1e-6)` over the last dimension, computed in float32 (float64 stays)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gate_logarithm(
    a: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None,
    *,
    safe: bool = False,
    lower_bound: float | None = None,
) -> Tensor:
    """The log decay of a gate's logits: `-exp(A_log) softplus(a + dt_bias)` (Mamba-2's, arXiv 2412.06464, section 3).

    safe: `lower_bound * sigmoid(exp(A_log) (a + dt_bias))` instead, which stays above lower_bound (arXiv 2510.26692).

    Args:
        a: `[B, T, HV]` or, by channel, `[B, T, HV, K]`.
        A_log: `[HV]`.
        dt_bias: `[HV]` or `[HV * K]`; None for zero.

    Raises:
        ValueError: safe without a lower bound in [-5, 0).
    """
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    logits = a.to(wide)
    if dt_bias is not None:
        logits = logits + dt_bias.to(wide).reshape(a.shape[2:])
    rate = A_log.to(wide).exp().reshape(-1, *[1] * (a.dim() - 3))
    if not safe:
        return -rate * F.softplus(logits)
    if lower_bound is None or not -5.0 <= lower_bound < 0.0:
        raise ValueError(f"gate_logarithm: lower_bound = {lower_bound}, needed a number in [-5, 0) for the safe gate")
    return lower_bound * torch.sigmoid(rate * logits)


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, *, use_qk_l2norm_in_kernel: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    if use_qk_l2norm_in_kernel:
        q, k = l2_normalize(q), l2_normalize(k)
    return linear_attention(q, k, v, rule="delta", **options)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """DeltaNet: `S <- S + beta k (v - S^T k)^T`, `o = scale S^T q` (arXiv 2406.06484, eq. 4).

    Args:
        q, k: `[B, T, H, K]`; k of unit length, or use_qk_l2norm_in_kernel.
        v: `[B, T, HV, V]`, HV a multiple of H.
        beta: `[B, T, HV]`, in (0, 2).
        scale: of q; K^-1/2 when None.
        initial_state: `[N, HV, K, V]`; zero when None.
        output_final_state: return the states after the last tokens.
        use_qk_l2norm_in_kernel: normalise q and k first.
        cu_seqlens: int64 or int32 `[N+1]` with B = 1: offsets of packed sequences.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final states `[N, HV, K, V]` or None.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    return _delta_rule(
        q,
        k,
        v,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        mode=mode,
    )


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_delta_rule` token by token: the form for decoding. Differentiable too."""
    return chunk_delta_rule(
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, mode="recurrent"
    )


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet: the state decays by exp(g_t) before the delta rule (arXiv 2412.06464, eq. 10).

    Args:
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens: as in
            :func:`chunk_delta_rule`.
        g: `[B, T, HV]`, natural logarithm of the decay, at most 0.
        use_gate_in_kernel: g holds a gate's logits; see :func:`gate_logarithm` for A_log and dt_bias.
        use_beta_sigmoid_in_kernel: beta holds logits.
        allow_neg_eigval: and its sigmoid is doubled, so that a state can be reflected.
        state_v_first: states are `[N, HV, V, K]`.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
        ValueError: use_gate_in_kernel without A_log.
    """
    if use_gate_in_kernel:
        if A_log is None:
            raise ValueError("chunk_gated_delta_rule: use_gate_in_kernel needs A_log of shape [HV]; A_log is None")
        g = gate_logarithm(g, A_log, dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(beta if beta.dtype == torch.float64 else beta.float()) * (2.0 if allow_neg_eigval else 1.0)
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    o, state = _delta_rule(
        q,
        k,
        v,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        beta=beta,
        g=g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        mode=mode,
    )
    return o, state.transpose(-1, -2).contiguous() if state_v_first and state is not None else state


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_gated_delta_rule` token by token: the form for decoding. Differentiable too."""
    return chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        A_log,
        dt_bias,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        state_v_first,
        cu_seqlens,
        mode="recurrent",
    )


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention: row i of the state decays by exp(g_t[i]) before the delta rule (arXiv 2510.26692, eq. 1).

    Args:
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens: as in
            :func:`chunk_delta_rule`.
        g: `[B, T, HV, K]`, natural logarithm of the decay, at most 0.
        use_gate_in_kernel: g holds a gate's logits; A_log `[HV]`, dt_bias `[HV * K]`, safe_gate and lower_bound as in
            :func:`gate_logarithm`.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
        ValueError: use_gate_in_kernel without A_log, or a safe gate without a lower bound in [-5, 0).
    """
    if use_gate_in_kernel:
        if A_log is None:
            raise ValueError("chunk_kda: use_gate_in_kernel needs A_log of shape [HV]; A_log is None")
        g = gate_logarithm(g, A_log, dt_bias, safe=safe_gate, lower_bound=lower_bound)
    return _delta_rule(
        q,
        k,
        v,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        beta=beta,
        g=g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        mode=mode,
    )


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_kda` token by token: the form for decoding. Differentiable too."""
    return chunk_kda(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        A_log,
        dt_bias,
        safe_gate,
        lower_bound,
        cu_seqlens,
        mode="recurrent",
    )


def gated_delta_rule_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    g: Tensor | None = None,
    a: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta: Tensor | None = None,
    b: Tensor | None = None,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One step of the gated delta rule for every sequence of a batch, states updated in place. No gradient.

    Args:
        q, k: `[B, T, H, K]`, T usually 1.
        v: `[B, T, HV, V]`.
        state: float32 `[P, HV, K, V]`, a pool of states; sequence s uses row state_indices[s], or row s.
        g: `[B, T, HV]`, the log decay; or a, A_log and dt_bias, from which :func:`gate_logarithm` makes it.
        beta: `[B, T, HV]`; or b, its logits.
        scale: of q; K^-1/2 when None.
        state_indices: int64 `[B]`, each row of the pool at most once.
        out: `[B, T, HV, V]` to write to.

    Returns:
        o `[B, T, HV, V]`.

    Raises:
        ValueError: neither g nor a with A_log is given, or neither beta nor b.
        RuntimeError: a shape, dtype or device does not fit.
    """
    if g is None:
        if a is None or A_log is None:
            raise ValueError("gated_delta_rule_decode: needed g, or a with A_log (and dt_bias); got neither")
        g = gate_logarithm(a, A_log, dt_bias)
    if beta is None:
        if b is None:
            raise ValueError("gated_delta_rule_decode: needed beta, or b, its logits; got neither")
        beta = torch.sigmoid(b.float())
    o = linear_attention_step_(q, k, v, state, beta=beta, g=g, rule="delta", scale=scale, state_indices=state_indices)
    return o if out is None else out.copy_(o)
