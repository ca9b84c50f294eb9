# SPDX-License-Identifier: Apache-2.0
"""Squared 2-Wasserstein distances of many one-dimensional samples at once. Kernel: csrc/ops/sorted_w2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright import _native
from tilewright.reference.sorted_w2 import sorted_w2 as by_sorting

_native.require()
_ops = torch.ops.tilewright

KERNEL_SAMPLES = 128
"""Up to so many samples the kernel counts ranks, which is quadratic in them; beyond it torch sorts."""


def sorted_w2(z: Tensor, v: Tensor) -> Tensor:
    """`W2^2(Z_:j, V_:j)`, the squared 2-Wasserstein distance between the samples of every column j.

    With as many samples on both sides it is `(1/n) sum_i (sort(Z)_ij - sort(V)_ij)^2` (LinEAS, arXiv 2503.10679,
    section 3); else the integral of `(Q_Z(t) - Q_V(t))^2` over the merged breakpoints i/n and j/m, exactly.
    Differentiable in both; permutations count as constants, so that at ties the gradient is one of the subgradients
    (the sort is stable).

    Args:
        z: `[n, D]`, any floating type; float64 is computed in float64, all else in float32.
        v: `[m, D]`.

    Returns:
        `[D]`, float32 (float64 for float64). A column with NaN on either side is NaN.

    Raises:
        ValueError: z or v is no matrix, has no sample, or their widths differ.
    """
    for name, x in (("z", z), ("v", v)):
        if x.dim() != 2 or x.shape[0] == 0:
            raise ValueError(f"sorted_w2: {name} has shape {list(x.shape)}, needed [at least 1 sample, D]")
    if z.shape[1] != v.shape[1]:
        raise ValueError(f"sorted_w2: z has {z.shape[1]} columns, v has {v.shape[1]}; they must be the same")
    if z.device.type != "cpu" or max(z.shape[0], v.shape[0]) > KERNEL_SAMPLES:
        return by_sorting(z, v)
    cost: Tensor = _ops.sorted_w2(z, v)[0]
    return cost


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("tilewright::sorted_w2")
def _(z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(z.dim() == 2 and v.dim() == 2, lambda: "z must be [n, D] and v [m, D]")
    return z.new_empty(z.shape[1], dtype=_wide(z)), z.new_empty(z.shape, dtype=_wide(z))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_cost: Tensor, d_gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    del d_gradient
    z, v, slope = ctx.saved_tensors
    d_z = (slope * d_cost).to(z.dtype) if ctx.needs_input_grad[0] else None
    # The distance is symmetric: the roles are exchanged for the other side.
    d_v = (_ops.sorted_w2(v.to(slope.dtype), z)[1] * d_cost).to(v.dtype) if ctx.needs_input_grad[1] else None
    return d_z, d_v


torch.library.register_autograd("tilewright::sorted_w2", _backward, setup_context=_setup)
