# SPDX-License-Identifier: Apache-2.0
"""HGRN's element-wise recurrence (arXiv 2311.04823). Kernel: csrc/ops/hgrn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.ops.sequence import piece

_ops = torch.ops.tilewright


def chunk_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`h_t = exp(g_t) h_{t-1} + x_t` for every channel (Qin et al., arXiv 2311.04823, eq. 3).

    Differentiable in x, g and initial_state.

    Args:
        x: `[B, T, D]`, any floating type; float64 is computed in float64, all else in float32.
        g: `[B, T, D]`, natural logarithm of the decay, at most 0.
        initial_state: `[N, D]`; zero when None. N is B, or the number of packed sequences.
        output_final_state: return the states after the last tokens.
        cu_seqlens: int64 or int32 `[N+1]` with B = 1: offsets of packed sequences, which may be empty.

    Returns:
        h `[B, T, D]` in the dtype of x, and the final states `[N, D]`, float32 (float64 for float64), or None.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    if (here := piece()) is not None:
        options = {"output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
        return here.hgrn(chunk_hgrn, x, g, initial_state=initial_state, **options)
    h, state = _ops.hgrn(x, g, initial_state, cu_seqlens)
    return h.to(x.dtype), state if output_final_state else None


def fused_recurrent_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_hgrn`: one pass over the tokens serves both names."""
    return chunk_hgrn(x, g, initial_state, output_final_state, cu_seqlens)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("tilewright::hgrn")
def _(x: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 3, lambda: "x must be [B, T, D]")
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape, dtype=_wide(x)), x.new_empty((sequences, x.shape[2]), dtype=_wide(x))


@torch.library.register_fake("tilewright::hgrn_backward")
def _(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    d_h: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = x.new_empty(x.shape, dtype=_wide(x))
    return d_x, torch.empty_like(d_x), d_state.new_empty(d_state.shape, dtype=_wide(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, g, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(x, g, initial_state, cu_seqlens, output[0])


def _backward(ctx: Any, d_h: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    x, g, initial_state, cu_seqlens, h = ctx.saved_tensors
    d_x, d_g, d_initial = _ops.hgrn_backward(x, g, initial_state, cu_seqlens, h, d_h, d_state)
    return (
        d_x.to(x.dtype),
        d_g.to(g.dtype),
        None if initial_state is None else d_initial.to(initial_state.dtype),
        None,
    )


torch.library.register_autograd("tilewright::hgrn", _backward, setup_context=_setup)
