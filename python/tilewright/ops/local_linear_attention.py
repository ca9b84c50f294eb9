# SPDX-License-Identifier: Apache-2.0
"""Local linear attention (Zuo et al., arXiv 2510.01450) and Parallax (arXiv 2605.29157).

Kernel: csrc/ops/local_linear_attention. Oracle: tilewright.reference.local_linear_attention.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tilewright import _native

_native.require()
_ops = torch.ops.tilewright

DIRECT_MAX_KEY_SIZE = 32
"""Largest K that `solver="auto"` solves by Cholesky: forming K^2/2 moments costs as much as about K/4 iterations."""


def lla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge_lambda: float | Tensor = 1.0,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    cg_rtol: float = 1e-4,
    cg_max_iters: int = 32,
    preconditioner: Literal["jacobi"] | None = None,
    solver: Literal["auto", "cg", "direct"] = "auto",
    ridge: Literal["relative", "absolute"] = "relative",
    ridge_grad: bool = True,
    cu_seqlens: Tensor | None = None,
    return_stats: bool = False,
) -> Any:
    """At each query, the value there of a weighted ridge regression of values on the keys that the query sees.

    With `w_ij = exp(scale q_i.k_j - m_i)`, m_i the largest visible score, and `z_ij = k_j - q_i`::

        o_i = b  of   min over (b, W) of  1/2 sum_j w_ij |v_j - b - W z_ij|^2 + 1/2 r_i |W|_F^2

    Softmax attention is the same with W = 0. Time grows with T^2 like softmax attention's, at (iterations + 2) times
    the cost; memory grows with T.

    Args:
        q: `[B, T, HQ, K]`, or `[B, T, K]` for one head; float32, bfloat16, float16 (computed in float32) or float64.
        k: `[B, S, H, K]`, the dtype of q; HQ a multiple of H, query head h reads key head h // (HQ / H).
        v: `[B, S, H, V]`, the dtype of q.
        ridge_lambda: positive, broadcastable to `[B, T, HQ]`. 0 is allowed with solver "direct" where every query sees
            more than K keys.
        scale: of the scores; K^-1/2 when None.
        causal: query i sits at position S - T + i and sees the keys up to there; False: all keys.
        window_size: and of those only the last so many; None for all.
        cg_rtol: a row's conjugate gradients stop once |residual| <= cg_rtol |right-hand side|.
        cg_max_iters: and after so many iterations at the latest.
        preconditioner: "jacobi" divides by the diagonal of the matrix.
        solver: "cg", or "direct": moments of the keys and Cholesky, exact, cost K^2 / 2 a pair of query and key; "auto"
            takes "direct" for K <= 32.
        ridge: "relative": r = lambda sum_j w_ij, a number without units that any shift of the scores leaves;
            "absolute": r = lambda where weights are exp(scale q.k), not shifted.
        ridge_grad: False takes the factor sum_j w_ij of a relative ridge as a constant in the backward pass, as the
            published kernels do; the gradients then differ from those of the function.
        cu_seqlens: int32 or int64 `[N+1]` with B = 1 and S = T: offsets of packed sequences. Rows behind the last give
            zeros.
        return_stats: also return, without gradients, per row: "omega" = sum_j w_ij, "rho" and "delta" of the paper,
            "iters" (int32; 0 for "direct") and "residual", |residual| / |right-hand side| where the solver stopped.

    Returns:
        `[B, T, HQ, V]` in the dtype of q (`[B, T, V]` for one head), differentiable in q, k, v and ridge_lambda; with
        return_stats a pair of it and a dict. A query that sees no key gives zeros. The bits of a row depend on its
        sequence alone, not on packing or threads.

    On a CUDA device bfloat16 and float16 with solver "cg", no preconditioner and K and V multiples of 8 up to 128 use
    the tensor cores: products in 16 bits with float32 sums, and a residual is not followed below 2^-10 (bfloat16) or
    2^-13 of the right-hand side. Everything else has a plain kernel there. The device is not waited for: where the CPU
    refuses an entry of ridge_lambda the row is NaN, where it refuses one of cu_seqlens the offset is clamped.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or ridge_lambda has an entry that is not positive.
        ValueError: an option is none of its words.
    """
    _require_word("lla_attention", "solver", solver, ("auto", "cg", "direct"))
    _require_word("lla_attention", "ridge", ridge, ("relative", "absolute"))
    _require_word("lla_attention", "preconditioner", preconditioner, (None, "jacobi"))
    single = q.dim() == 3
    if single:
        q, k, v = (x.unsqueeze(2) if x.dim() == 3 else x for x in (q, k, v))
    o, tilt, rows, iterations = _ops.lla_forward(
        q,
        k,
        v,
        _per_row("lla_attention", ridge_lambda, q),
        None,
        cu_seqlens,
        None,
        _scale(q, scale),
        causal,
        window_size,
        cg_rtol,
        cg_max_iters,
        _solver(q, solver),
        preconditioner == "jacobi",
        ridge == "absolute",
        ridge_grad,
    )
    o = o.squeeze(2) if single else o
    return (o, _statistics(tilt, rows, iterations)) if return_stats else o


def lla_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    *,
    ridge_lambda: float | Tensor = 1.0,
    scale: float | None = None,
    rho_init: Tensor | None = None,
    window_size: int | None = None,
    cg_rtol: float = 1e-4,
    cg_max_iters: int = 32,
    preconditioner: Literal["jacobi"] | None = None,
    solver: Literal["auto", "cg", "direct"] = "auto",
    ridge: Literal["relative", "absolute"] = "relative",
    return_stats: bool = False,
) -> Any:
    """:func:`lla_attention` of the last T tokens of each sequence over a cache that already holds them. No gradient.

    Args:
        q: `[B, T, HQ, K]`; T is 1 when decoding.
        k_cache, v_cache: `[B, L, H, K]` and `[B, L, H, V]`, of which only the first cache_lens rows are read.
        cache_lens: int32 or int64 `[B]`: tokens of each sequence, those of q included.
        rho_init: `[B, T, HQ, K]`, where conjugate gradients begin: the rho of the token before. The visible set only
            grows, so that it is usually close; any value is allowed, its best multiple is taken.
        return_stats: a dict as :func:`lla_attention` returns it in place of rho.

    The other arguments are those of :func:`lla_attention`.

    Returns:
        o `[B, T, HQ, V]` in the dtype of q, and rho `[B, T, HQ, K]` for the next call.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or a sequence holds fewer tokens than it has queries.
        ValueError: an option is none of its words.
    """
    _require_word("lla_decode", "solver", solver, ("auto", "cg", "direct"))
    _require_word("lla_decode", "ridge", ridge, ("relative", "absolute"))
    _require_word("lla_decode", "preconditioner", preconditioner, (None, "jacobi"))
    with torch.no_grad():
        o, tilt, rows, iterations = _ops.lla_forward(
            q,
            k_cache,
            v_cache,
            _per_row("lla_decode", ridge_lambda, q),
            rho_init,
            None,
            cache_lens,
            _scale(q, scale),
            True,
            window_size,
            cg_rtol,
            cg_max_iters,
            _solver(q, solver),
            preconditioner == "jacobi",
            ridge == "absolute",
            True,
        )
    stats = _statistics(tilt, rows, iterations)
    return o, (stats if return_stats else stats["rho"])


def relmm(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """All inner products `x_i . (k_j - q_i)`, without forming the differences: `X K^T - rowsum(X o Q)`.

    Args:
        x, q: `[..., T, K]`.
        k: `[..., S, K]`.

    Returns:
        `[..., T, S]`. Source: Zuo et al., arXiv 2510.01450, section on FlashLLA.
    """
    return x @ k.transpose(-1, -2) - (x * q).sum(-1, keepdim=True)


def parallax(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Local linear attention whose regression is not solved but learned (Parallax, arXiv 2605.29157).

    With `p = softmax(scale q.k)` over the visible keys and `s_j = r.k_j` (not scaled)::

        o = sum_j p_j v_j (1 + sum_l p_l s_l) - sum_j p_j s_j v_j

    Args:
        q, r: `[B, T, HQ, K]`; float32, bfloat16, float16 (computed in float32) or float64.
        k, v: `[B, S, H, K]` and `[B, S, H, V]`, HQ a multiple of H.
        scale, causal, window_size, cu_seqlens: as in :func:`lla_attention`.

    Returns:
        `[B, T, HQ, V]` in the dtype of q, differentiable in q, r, k and v.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    o: Tensor = _ops.parallax_forward(q, r, k, v, cu_seqlens, _scale(q, scale), causal, window_size)
    return o


def _require_word(op: str, argument: str, got: object, words: tuple[object, ...]) -> None:
    if got not in words:
        raise ValueError(f"{op}: {argument} = {got!r}, needed one of {', '.join(map(repr, words))}")


def _scale(q: Tensor, scale: float | None) -> float:
    return max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)


def _solver(q: Tensor, solver: str) -> str:
    return ("direct" if q.shape[-1] <= DIRECT_MAX_KEY_SIZE else "cg") if solver == "auto" else solver


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _per_row(op: str, ridge_lambda: float | Tensor, q: Tensor) -> Tensor:
    """lambda as `[B, T, HQ]` in the type that the kernel computes in."""
    if q.dim() != 4:
        raise RuntimeError(f"{op}: q has shape {list(q.shape)}, needed [B, T, HQ, K]")
    if not isinstance(ridge_lambda, Tensor):
        if ridge_lambda < 0:  # the entries of a tensor on a device are not looked at
            raise RuntimeError(f"{op}: ridge_lambda has a negative entry; every entry must be positive")
        return q.new_full(q.shape[:3], ridge_lambda, dtype=_compute_dtype(q))
    try:
        return ridge_lambda.to(_compute_dtype(q)).expand(q.shape[:3])
    except RuntimeError as wrong:
        raise RuntimeError(
            f"{op}: ridge_lambda has shape {list(ridge_lambda.shape)}, which does not broadcast to [B, T, HQ] = "
            f"{list(q.shape[:3])}"
        ) from wrong


def _statistics(tilt: Tensor, rows: Tensor, iterations: Tensor) -> dict[str, Tensor]:
    """The paper's numbers from the solution x of the centred problem: rho = x / (1 + h), delta = omega / (1 + h)."""
    _, omega, leverage, residual = rows.detach().unbind(-1)
    return {
        "omega": omega,
        "rho": tilt.detach() / (1 + leverage)[..., None],
        "delta": omega / (1 + leverage),
        "iters": iterations,
        "residual": residual,
    }


@torch.library.register_fake("tilewright::lla_forward")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: Tensor,
    start: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    rtol: float,
    max_iterations: int,
    solver: str,
    jacobi: bool,
    absolute: bool,
    ridge_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(q.dim() == 4 and v.dim() == 4, lambda: "lla_forward: q and v must have four dimensions")
    dtype = _compute_dtype(q)
    return (
        q.new_empty((*q.shape[:3], v.shape[3])),
        q.new_empty(q.shape, dtype=dtype),
        q.new_empty((*q.shape[:3], 4), dtype=dtype),
        q.new_empty(q.shape[:3], dtype=torch.int32),
    )


@torch.library.register_fake("tilewright::lla_backward")
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: Tensor,
    tilt: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    rtol: float,
    max_iterations: int,
    solver: str,
    jacobi: bool,
    absolute: bool,
    ridge_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ridge.new_empty(ridge.shape)


@torch.library.register_fake("tilewright::parallax_forward")
def _(
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor:
    torch._check(q.dim() == 4 and v.dim() == 4, lambda: "parallax_forward: q and v must have four dimensions")
    return q.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.register_fake("tilewright::parallax_backward")
def _(
    grad: Tensor,
    q: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), r.new_empty(r.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _lla_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ridge, start, cu_seqlens, lengths, *options = inputs
    if lengths is not None or start is not None:
        raise RuntimeError("lla_decode has no gradient; use lla_attention, or torch.no_grad()")
    ctx.save_for_backward(q, k, v, ridge, output[1], cu_seqlens)
    ctx.options = options


def _lla_backward(ctx: Any, grad: Tensor, *rest: Any) -> tuple[Any, ...]:
    q, k, v, ridge, tilt, cu_seqlens = ctx.saved_tensors
    grads = _ops.lla_backward(grad, q, k, v, ridge, tilt, cu_seqlens, *ctx.options)
    return (*grads, *([None] * (3 + len(ctx.options))))


def _parallax_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, r, k, v, cu_seqlens, *options = inputs
    ctx.save_for_backward(q, r, k, v, cu_seqlens)
    ctx.options = options


def _parallax_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, r, k, v, cu_seqlens = ctx.saved_tensors
    grads = _ops.parallax_backward(grad, q, r, k, v, cu_seqlens, *ctx.options)
    return (*grads, None, *([None] * len(ctx.options)))


torch.library.register_autograd("tilewright::lla_forward", _lla_backward, setup_context=_lla_context)
torch.library.register_autograd("tilewright::parallax_forward", _parallax_backward, setup_context=_parallax_context)
