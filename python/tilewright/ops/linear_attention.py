# SPDX-License-Identifier: Apache-2.0
"""Linear attention with a matrix state: one engine for every rule and decay. Kernel: csrc/ops/linear_attention."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tilewright.ops.sequence import piece

Rule = Literal["additive", "delta"]
Mode = Literal["chunk", "recurrent"]

_ops = torch.ops.tilewright


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    rule: Rule = "additive",
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    mode: Mode = "chunk",
) -> tuple[Tensor, Tensor | None]:
    """Attention through a matrix state that every token decays, writes to and reads, in this order.

    For each value head::

        S  <- diag(exp(g_t)) S
        S  <- S + k_t v_t^T                                rule "additive"
        S  <- S + k_t (beta_t (v_t - S^T k_t))^T           rule "delta" (arXiv 2406.06484, eq. 4)
        o_t = scale S^T q_t

    Time is linear in T. On the CPU, memory beside inputs and outputs does not grow with it, and a gradient keeps one
    state every 256 tokens (128 with a decay a channel) and, for the delta rule, as many numbers as v has. On a CUDA
    device the chunk form works in 128 bytes a token and value head for the delta rule, 1 KB with a decay a channel, and
    nothing is kept; one long sequence of few heads is cut in segments that go side by side.
    Differentiable in q, k, v, beta, g and initial_state.

    Args:
        q, k: `[B, T, H, K]`, any floating type; float64 is computed in float64, all else in float32. On a CUDA device
            the chunk form of bfloat16 and float16 rounds operands of products to that type, and adds up in float32.
        v: `[B, T, HV, V]`, HV a multiple of H; value head j reads query and key head j // (HV / H).
        beta: `[B, T, HV]`, for the rule "delta". With keys of unit length the state stays bounded for beta in [0, 2].
        g: natural logarithm of the decay, at most 0: `[HV]`, `[B, T, HV]` or, by channel of the key, `[B, T, HV, K]`.
            None for no decay. -inf forgets everything.
        scale: of q; K^-1/2 when None.
        initial_state: `[N, HV, K, V]`; zero when None. N is B, or the number of packed sequences.
        output_final_state: return the states after the last tokens.
        cu_seqlens: int64 or int32 `[N+1]` with B = 1: offsets of packed sequences, which may be empty. Rows of q past
            the last offset give zeros. On a CUDA device they are not looked at by the host: offsets that fall or pass T
            are cut off, without an error.
        mode: "chunk" treats 16, 32 or, on a CUDA device, 64 tokens at once as matrix products; "recurrent" goes token
            by token, which is the form for decoding. On the CPU both run in chunks where a gradient is wanted.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final states, float32 (float64 for float64), or None. The bits
        depend neither on the number of threads nor on how sequences are packed.

    Raises:
        ValueError: rule or mode is neither of its words.
        RuntimeError: a shape, dtype or device does not fit.
    """
    if rule not in ("additive", "delta"):
        raise ValueError(f"linear_attention: rule = {rule!r}, needed 'additive' or 'delta'")
    if mode not in ("chunk", "recurrent"):
        raise ValueError(f"linear_attention: mode = {mode!r}, needed 'chunk' or 'recurrent'")
    if (here := piece()) is not None:
        options = {"beta": beta, "g": g, "rule": rule, "scale": scale, "cu_seqlens": cu_seqlens, "mode": mode}
        return here.linear_attention(
            linear_attention, q, k, v, initial_state=initial_state, output_final_state=output_final_state, **options
        )
    inputs = (q, k, v, beta, g, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    factor = max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    if mode == "chunk" and not save and (length := _segment_tokens(q, v, cu_seqlens)):
        o, state = _in_segments(q, k, v, beta, g, rule, factor, initial_state, length)
    else:
        o, state, _, _ = _ops.linear_attention(
            q, k, v, beta, g, initial_state, cu_seqlens, factor, rule == "delta", mode == "recurrent", save
        )
    return o, state if output_final_state else None


# Segments shorter than this save less time than they cost.
_LEAST_SEGMENT = 1024


def _segment_tokens(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> int:
    """Tokens of the segments that one long sequence of few heads is cut into on a CUDA device; 0: it stays whole.

    A block of the device goes through a sequence's chunks one after the other. Where heads leave most of the device
    idle, segments go side by side, twice: to find what each does to a state, and from the states that follow.
    """
    narrow = q.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type != "cuda" or not narrow or cu_seqlens is not None or q.shape[0] != 1 or q.shape[3] > 128:
        return 0
    blocks = v.shape[2] * -(-(v.shape[3] + q.shape[3]) // 64)
    most = torch.cuda.get_device_properties(q.device).multi_processor_count // blocks
    count = min(most, q.shape[1] // _LEAST_SEGMENT)
    # Two passes over a quarter of the sequence, and the way between them: half the time at best.
    return 0 if count < 4 else 64 * -(-q.shape[1] // (64 * count))


def _in_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    rule: Rule,
    scale: float,
    initial_state: Tensor | None,
    length: int,
) -> tuple[Tensor, Tensor]:
    """One sequence in segments: their maps of states side by side, the states before each, then each from its own."""
    tokens = q.shape[1]
    count = -(-tokens // length)
    offsets = (length * torch.arange(count + 1, device=q.device)).clamp(max=tokens)
    most = slice(0, (count - 1) * length)
    maps, written = state_transition(
        k[:, most],
        v=v[:, most],
        beta=None if beta is None else beta[:, most],
        g=g if g is None or g.dim() == 1 else g[:, most],
        rule=rule,
        cu_seqlens=offsets[:-1],
    )
    state = torch.zeros_like(written[:1]) if initial_state is None else initial_state.to(written.dtype)
    states = [state]
    for i in range(count - 1):
        state = maps[i] @ state + written[i]
        states.append(state)
    o, final, _, _ = _ops.linear_attention(
        q, k, v, beta, g, torch.cat(states), offsets, scale, rule == "delta", False, False
    )
    return o, final[-1:]


def linear_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    rule: Rule = "additive",
    scale: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """:func:`linear_attention` for the next tokens of a batch, with its states updated in place. No gradient.

    Args:
        q, k, v, beta, g, rule, scale: as in :func:`linear_attention`; T is usually 1.
        state: float32 `[P, HV, K, V]`, contiguous: a pool of states; sequence b uses row state_indices[b], or row b.
        state_indices: int64 `[B]`, no row twice. On a CUDA device they are not looked at by the host: a sequence whose
            row does not exist gives NaN and touches no state.

    Returns:
        o `[B, T, HV, V]` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or a row of the pool does not exist or is named twice.
    """
    factor = max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    o: Tensor = _ops.linear_attention_step(q, k, v, beta, g, state, state_indices, factor, rule == "delta")
    return o


def state_transition(
    k: Tensor,
    *,
    v: Tensor | None = None,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    rule: Rule = "additive",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The affine map of states that a segment of tokens is: `S -> M S + B`.

    The columns of a state evolve independently, so one pass over the tokens from the state `[0, I]` with the values
    `[v, 0]` gives B and M side by side.

    Args:
        k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`; None for V = 0.
        beta, g, rule, cu_seqlens: as in :func:`linear_attention`.

    Returns:
        M `[N, HV, K, K]` and B `[N, HV, K, V]`, float32 (float64 for float64 inputs).
    """
    batch, tokens, heads, key_size = k.shape
    value_heads = v.shape[2] if v is not None else beta.shape[2] if beta is not None else heads
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    values = k.new_zeros(batch, tokens, value_heads, key_size)
    identity = torch.eye(key_size, dtype=wide, device=k.device).expand(sequences, value_heads, key_size, key_size)
    if v is not None:
        values = torch.cat([v.to(k.dtype), values], dim=-1)
        identity = torch.cat([identity.new_zeros(sequences, value_heads, key_size, v.shape[-1]), identity], dim=-1)
    _, state = linear_attention(
        k,
        k,
        values,
        beta=beta,
        g=g,
        rule=rule,
        scale=1.0,
        initial_state=identity,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    assert state is not None
    return state[..., -key_size:], state[..., :-key_size]


def _on_tensor_cores(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the device's kernel for tensor cores takes the gradient: dv has the dtype of v."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and k.dtype == v.dtype == q.dtype
        and q.numel() > 0
        and q.shape[3] % 8 == 0
        and q.shape[3] <= 128
        and v.shape[3] % 8 == 0
        and v.shape[3] <= 256
    )


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


@torch.library.register_fake("tilewright::linear_attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    delta: bool,
    recurrent: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(q.dim() == 4, lambda: "q must be [B, T, H, K]")
    torch._check(v.dim() == 4, lambda: "v must be [B, T, HV, V]")
    wide = _wide(q, k, v)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (v.shape[2], q.shape[3], v.shape[3])
    state = v.new_empty((sequences, *sizes), dtype=wide)
    kept: int | torch.SymInt = 0
    on_cuda = v.device.type == "cuda"
    if save and on_cuda:
        kept = 0 if initial_state is None else sequences
    elif save:
        step = 128 if g is not None and g.dim() == 4 else 256
        # How packed sequences fall into segments is in the data.
        kept = (
            sequences * (-(-q.shape[1] // step)) if cu_seqlens is None else torch.library.get_ctx().new_dynamic_size()
        )
    errors = v.new_empty(v.shape if save and delta and not on_cuda else (0, 0, *v.shape[2:]), dtype=wide)
    return v.new_empty(v.shape), state, v.new_empty((kept, *sizes), dtype=wide), errors


@torch.library.register_fake("tilewright::linear_attention_backward")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    errors: Tensor,
    d_out: Tensor,
    d_state: Tensor,
    scale: float,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(q, k, v)
    by_token = v.shape[:3]
    narrow = _on_tensor_cores(q, k, v)
    # Without a decay a channel, dq and dk come summed over the heads of a group.
    keys = (
        q.new_empty(q.shape)
        if narrow and (g is None or g.dim() < 4)
        else q.new_empty((*by_token, q.shape[3]), dtype=wide)
    )
    d_beta = q.new_empty(by_token if delta else (0,), dtype=wide)
    d_g: tuple[int, ...] = (0,)
    if g is not None:
        d_g = (*by_token, q.shape[3]) if g.dim() == 4 else by_token
    return (
        keys,
        torch.empty_like(keys),
        v.new_empty(v.shape, dtype=v.dtype if narrow else wide),
        d_beta,
        q.new_empty(d_g, dtype=wide),
        d_state.new_empty(d_state.shape, dtype=wide),
    )


@torch.library.register_fake("tilewright::linear_attention_step")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    scale: float,
    delta: bool,
) -> Tensor:
    return v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, g, initial_state, cu_seqlens, scale, delta, _, save = inputs
    ctx.save_for_backward(q, k, v, beta, g, cu_seqlens, *output[2:])
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.scale, ctx.delta, ctx.save = scale, delta, save
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, d_out: Tensor, d_state: Tensor, *_: Tensor) -> tuple[Any, ...]:
    q, k, v, beta, g, cu_seqlens, checkpoints, errors = ctx.saved_tensors
    if not ctx.save:
        raise RuntimeError("linear_attention: no states were kept for the gradient; call the operator with save = True")
    dq, dk, dv, d_beta, d_g, d_initial = _ops.linear_attention_backward(
        q, k, v, beta, g, cu_seqlens, checkpoints, errors, d_out, d_state, ctx.scale, ctx.delta
    )
    if dq.shape[2] != q.shape[2]:
        # One query and key head serves a group of value heads, and the kernel left their sum to us.
        dq, dk = (x.unflatten(2, (q.shape[2], -1)).sum(3) for x in (dq, dk))
    if g is not None and g.dim() == 1:
        d_g = d_g.sum((0, 1))
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        None if beta is None else d_beta.to(beta.dtype),
        None if g is None else d_g.to(g.dtype),
        None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype),
        *[None] * 5,
    )


torch.library.register_autograd("tilewright::linear_attention", _backward, setup_context=_setup)
