# SPDX-License-Identifier: Apache-2.0
"""A mixture of memories over any linear recurrence, in one packed call (MoM, arXiv 2502.13685, section 3)."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from tilewright import ops
from tilewright.nn.mom.dispatch import Dispatch

Op = Literal["gated_delta_rule", "delta_rule", "gla", "linear"]
Mode = Literal["chunk", "recurrent"]

OPS: tuple[str, ...] = get_args(Op)
USES_BETA = ("gated_delta_rule", "delta_rule")
USES_GATE = ("gated_delta_rule", "gla")


def mom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    num_memories: int,
    *,
    op: Op = "gated_delta_rule",
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """M memories, each with a state that only its own tokens touch, read out with the router's weights.

    Slot j of token t belongs to memory m = indices[t, j] (MoM, eqs. 6 to 8; F is the recurrence `op`)::

        S^m_t = F(S^m_{t-1}; k_tj, v_tj, g_tj, beta_tj)      other memories keep their state: no write, no decay
        o_t   = sum_j weights_tj * scale (S^{m_j}_t)^T q_t

    Slots are sorted stably by memory and sequence, the segments run as packed sequences of one call, and the reads
    are put back and summed over the slots in their order; so is every gradient. An always-on memory is one more slot
    with its own index and weight 1.

    Args:
        q: `[B, T, H, K]`, one query a token, or `[B, T, k, H, K]`, one a slot.
        k: `[B, T, k, H, K]`. v: `[B, T, k, H, V]`.
        g: natural logarithm of the decay, at most 0: `[B, T, k, H]` for "gated_delta_rule", `[B, T, k, H, K]` for
            "gla", None for the others.
        beta: `[B, T, k, H]` for the delta rules, None for the others.
        weights: `[B, T, k]`. indices: integers `[B, T, k]`, the memories of a token, all different; -1 for a slot that
            writes nothing and reads 0 (see :func:`mom_route`).
        num_memories: M.
        op: "gated_delta_rule", "delta_rule", "gla" or "linear" (no decay, no error correction).
        scale: of q; K^-1/2 when None.
        initial_state: `[N, M, H, K, V]`; zero when None. N is B, or the number of packed sequences.
        output_final_state: return the states after the last tokens.
        use_qk_l2norm_in_kernel: normalise q and k first (the delta rules).
        cu_seqlens: `[N + 1]` with B = 1: offsets of packed sequences.
        mode: "chunk" or, token by token, "recurrent".

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final states `[N, M, H, K, V]` or None. A memory without tokens
        keeps its initial state.

    Raises:
        ValueError: op is unknown, g or beta does not belong to it or is missing, a shape does not fit, or an index is
            out of range.
    """
    _check(q, k, v, g, beta, weights, indices, op)
    dispatch = Dispatch.of(indices, num_memories, cu_seqlens)
    states = (dispatch.num_sequences, num_memories, *k.shape[3:], v.shape[-1])
    if initial_state is not None and initial_state.shape != states:
        raise ValueError(
            f"mom_attention: initial_state has shape {list(initial_state.shape)}, needed {list(states)} [N, M, H, K, V]"
        )

    def sorted_slots(x: Tensor) -> Tensor:
        return dispatch.permute(x.flatten(0, 2))

    rows, state = recur(
        dispatch.gather(q.flatten(0, 1)) if q.dim() == 4 else sorted_slots(q),
        sorted_slots(k),
        sorted_slots(v),
        None if g is None else sorted_slots(g),
        None if beta is None else sorted_slots(beta),
        scale=scale,
        initial_state=None if initial_state is None else dispatch.split_state(initial_state),
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=dispatch.cu_seqlens,
        mode=mode,
    )
    o = dispatch.combine(rows, weights.flatten(0, 1)).unflatten(0, indices.shape[:2])
    return o, None if state is None else dispatch.join_state(state)


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    *,
    cu_seqlens: Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    mode: Mode,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over sorted rows `[R, H, ...]`, one packed sequence a segment: reads `[R, H, V]`, states.

    The delta rule where there is a beta, and any decay. A_log, dt_bias: of a gate in the kernel; g holds its logits.
    """
    q, k, v = q[None], k[None], v[None]
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "mode": mode,
    }
    if beta is None:
        o, state = ops.linear_attention(q, k, v, g=None if g is None else g[None], rule="additive", **options)
        return o[0], state
    options["use_qk_l2norm_in_kernel"] = use_qk_l2norm_in_kernel
    if g is None:
        o, state = ops.chunk_delta_rule(q, k, v, beta[None], **options)
        return o[0], state
    gate = {"use_gate_in_kernel": A_log is not None, "A_log": A_log, "dt_bias": dt_bias}
    o, state = ops.chunk_gated_delta_rule(q, k, v, g[None], beta[None], **options, **gate)  # type: ignore[arg-type]
    return o[0], state


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    weights: Tensor,
    indices: Tensor,
    op: str,
) -> None:
    if op not in OPS:
        raise ValueError(f"mom_attention: op = {op!r}, needed one of {', '.join(OPS)}")
    if k.dim() != 5:
        raise ValueError(f"mom_attention: k has shape {list(k.shape)}, needed [B, T, k, H, K]")
    slots, heads, size = k.shape[:3], k.shape[3], k.shape[4]
    read = (*slots[:2], heads, size) if q.dim() == 4 else tuple(k.shape)
    gate = (*slots, heads, size) if op == "gla" else (*slots, heads)
    needed: list[tuple[str, Tensor | None, tuple[int, ...] | None]] = [
        ("q", q, read),
        ("v", v, (*slots, heads, v.shape[-1])),
        ("weights", weights, tuple(slots)),
        ("indices", indices, tuple(slots)),
        ("g", g, gate if op in USES_GATE else None),
        ("beta", beta, (*slots, heads) if op in USES_BETA else None),
    ]
    for name, x, shape in needed:
        if (None if x is None else tuple(x.shape)) != shape:
            got = "is None" if x is None else f"has shape {list(x.shape)}"
            want = None if shape is None else list(shape)
            raise ValueError(
                f"mom_attention: {name} {got}, needed {want} for op = {op!r} and k of shape {list(k.shape)}"
            )
