# SPDX-License-Identifier: Apache-2.0
"""CATS: gated MLPs that skip the neurons whose gate activation is small (arXiv 2404.08763). Kernel:
csrc/ops/sparse_gated_mlp."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tilewright import _native

_native.require()
_ops = torch.ops.tilewright

Act = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTS: tuple[Act, ...] = ("silu", "gelu", "gelu_tanh", "relu")

__all__ = ["ACTS", "Act", "cats_activation", "sparse_gated_mlp", "weight_bytes_read"]


def cats_activation(x: Tensor, threshold: Tensor | float, act: Act = "silu") -> Tensor:
    """`act(x)` where `|act(x)| >= threshold`, else 0 (Lee et al., arXiv 2404.08763, eq. 4).

    Differentiable in x: the gradient of act where kept, 0 where dropped. A NaN is kept.

    Args:
        x: `[..., M]`, output of the gate projection, any floating type. float64 is computed in float64, all else in
            float32; what is compared has not been rounded to x's dtype yet.
        threshold: at least 0: a number, `[]`, or `[M]`, one a neuron. 0 keeps everything.
        act: "silu", "gelu", "gelu_tanh" or "relu".

    Returns:
        `[..., M]` in x's dtype.

    Raises:
        RuntimeError: a shape, dtype, device or threshold does not fit.
    """
    a: Tensor = _ops.cats_activation(x, _threshold(threshold), act)[0]
    return a


def sparse_gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor | float,
    act: Act = "silu",
    bias: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
    *,
    return_kept: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`W_down h`, `h = a * (W_up x)`, `a = cats_activation(W_gate x)`: rows of W_up and W_down^T that no token keeps
    are
    not read.

    Differentiable in x, weights and biases, with dense products; the threshold is a constant. A token's result is the
    same bits with any other tokens beside it, at every thread count and instruction-set level.

    Args:
        x: `[..., D]`, any floating type.
        w_gate, w_up: `[M, D]`, float32, bfloat16 or float64 (computed by the float64 reference, slowly), all of one
            dtype; sums are float32. Finite.
        w_down_t: `[M, D]`, the down projection transposed and contiguous: `down_proj.weight.T.contiguous()`, made once.
        threshold: at least 0: a number, `[]`, or `[M]`.
        act: "silu", "gelu", "gelu_tanh" or "relu".
        bias: of gate `[M]` (before act), up `[M]` (before the product) and down `[D]` (always added), each or None.
        return_kept: also return which neurons each token kept, bool `[..., M]`.

    Returns:
        `[..., D]` in x's dtype; with return_kept also the mask.

    Raises:
        RuntimeError: a shape, dtype, device or threshold does not fit.
    """
    biases = (None, None, None) if bias is None else bias
    y, kept = _ops.sparse_gated_mlp(x, w_gate, w_up, w_down_t, _threshold(threshold), act, *biases)
    return (y, kept) if return_kept else y


def weight_bytes_read(kept: Tensor, hidden: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of weights that :func:`sparse_gated_mlp` reads for the tokens of a mask: gate whole, up and down by rows.

    Args:
        kept: bool `[..., M]`, as the operator returns it.
        hidden: D.
        dtype: of the weights.
    """
    from tilewright import _host

    inner = kept.shape[-1]
    rows = kept.reshape(-1, inner)
    plan = _host.sparse_gated_mlp_plan(rows.shape[0], hidden, inner, int(rows.any(0).sum()), dtype.itemsize)
    return int(plan["bytes"])


def _threshold(threshold: Tensor | float) -> Tensor:
    return threshold if isinstance(threshold, Tensor) else torch.tensor(float(threshold))


@torch.library.register_fake("tilewright::cats_activation")
def _(x: Tensor, threshold: Tensor, act: str) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() >= 1, lambda: "x must be [..., M]")
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bool)


@torch.library.register_fake("tilewright::sparse_gated_mlp")
def _(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    act: str,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
) -> tuple[Tensor, Tensor]:
    torch._check(w_gate.dim() == 2 and x.shape[-1] == w_gate.shape[1], lambda: "x must be [..., D], w_gate [M, D]")
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], w_gate.shape[0]), dtype=torch.bool)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _value(z: Tensor, act: str) -> Tensor:
    if act == "silu":
        return torch.nn.functional.silu(z)
    if act == "relu":
        return torch.relu(z)
    return torch.nn.functional.gelu(z, approximate="tanh" if act == "gelu_tanh" else "none")


def _slope(z: Tensor, act: str) -> Tensor:
    """d act / d z."""
    if act == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if act == "relu":
        return (z > 0).to(z.dtype)
    if act == "gelu":
        return 0.5 * torch.erfc(-z * math.sqrt(0.5)) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    # z sigmoid(v) with v = 2 sqrt(2 / pi) (z + 0.044715 z^3)
    c = 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(c * (z + 0.044715 * z**3))
    return s + z * s * (1 - s) * c * (1 + 3 * 0.044715 * z * z)


def _activation_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, ctx.act = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1])


def _activation_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, kept = ctx.saved_tensors
    slope = _slope(x.to(_wide(x)), ctx.act)
    return torch.where(kept, grad.to(slope.dtype) * slope, 0.0).to(x.dtype), None, None


torch.library.register_autograd("tilewright::cats_activation", _activation_backward, setup_context=_activation_context)


def _mlp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_gate, w_up, w_down_t, _, ctx.act, b_gate, b_up, b_down = inputs
    ctx.down_bias = None if b_down is None else b_down.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, w_gate, w_up, w_down_t, b_gate, b_up, output[1])


def _mlp_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, w_gate, w_up, w_down_t, b_gate, b_up, kept = ctx.saved_tensors
    wide = _wide(w_gate)
    needed = ctx.needs_input_grad
    rows, dy = x.reshape(-1, x.shape[-1]).to(wide), grad.reshape(-1, x.shape[-1]).to(wide)
    mask = kept.reshape(-1, kept.shape[-1])
    gate, up, down = w_gate.to(wide), w_up.to(wide), w_down_t.to(wide)
    z, u = rows @ gate.T, rows @ up.T
    z = z if b_gate is None else z + b_gate.to(wide)
    u = u if b_up is None else u + b_up.to(wide)
    a = torch.where(mask, _value(z, ctx.act), 0.0)
    dh = dy @ down.T
    du = dh * a
    dz = torch.where(mask, dh * u * _slope(z, ctx.act), 0.0)
    return (
        (dz @ gate + du @ up).reshape(x.shape).to(x.dtype) if needed[0] else None,
        (dz.T @ rows).to(w_gate.dtype) if needed[1] else None,
        (du.T @ rows).to(w_up.dtype) if needed[2] else None,
        (torch.where(mask, a * u, 0.0).T @ dy).to(w_down_t.dtype) if needed[3] else None,
        None,
        None,
        None if b_gate is None else dz.sum(0).to(b_gate.dtype),
        None if b_up is None else du.sum(0).to(b_up.dtype),
        None if ctx.down_bias is None else dy.sum(0).to(ctx.down_bias),
    )


torch.library.register_autograd("tilewright::sparse_gated_mlp", _mlp_backward, setup_context=_mlp_context)
