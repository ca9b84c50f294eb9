# SPDX-License-Identifier: Apache-2.0
"""What a token passes between the linears. Kernels: csrc/ops/{rms_norm,rope,gated_activation}."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright import _native

_native.require()
_ops = torch.ops.tilewright


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang and Sennrich 2019, eq. 4), in float32.

    Args:
        x: `[..., K]`, any floating type.
        weight: `[K]`.
        eps: at least 0.

    Returns:
        `[..., K]` of x's dtype; the bits that the decode engine computes.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or eps is negative.
    """
    y: Tensor = _ops.rms_norm(x, weight, eps)
    return y


def rope_angles(positions: Tensor, frequencies: Tensor, gain: float = 1.0) -> Tensor:
    """Cosines and sines of rotary positions (Su et al. 2021, eq. 15).

    Args:
        positions: int64 `[...]`.
        frequencies: `[P]`, radians a position of each pair of channels.
        gain: a factor on both.

    Returns:
        float32 `[..., 2, P]`: cosines, then sines of position * frequency, the product formed in float32.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
    """
    angles: Tensor = _ops.rope_angles(positions, frequencies, gain)
    return angles


def rope_rotate_(x: Tensor, angles: Tensor, scales: Tensor | None = None) -> None:
    """Turn every head of x in place by its token's angles: channel c with channel c + D/2.

    Args:
        x: float32 `[T, H, D]`, contiguous, D even.
        angles: float32 `[T, 2, D/2]`, from :func:`rope_angles`.
        scales: `[H_s, D]` with H a multiple of H_s, or None: a factor on each channel behind the rotation (FireQ's
            post-RoPE scale), row h // (H / H_s) for head h.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or x is not contiguous.
    """
    _ops.rope_rotate_(x, angles, scales)


def gated_activation(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """`act(gate) * up`, the middle of a gated MLP (Shazeer 2020), in float32.

    Args:
        gate, up: `[..., K]`, any floating type.
        act: "silu" (SwiGLU), or on the CPU "relu2", the square of max(gate, 0) (BitNet b1.58 2B4T, arXiv 2504.12285).

    Returns:
        `[..., K]` of gate's dtype; the bits that the decode engine computes.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
        ValueError: act is another word.
    """
    if act not in ("silu", "relu2"):
        raise ValueError(f"gated_activation: act = {act!r}, needed 'silu' or 'relu2'")
    y: Tensor = (_ops.gated_activation if act == "silu" else _ops.gated_squared_relu)(gate, up)
    return y


@torch.library.register_fake("tilewright::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    del weight, eps
    return x.new_empty(x.shape)


@torch.library.register_fake("tilewright::rope_angles")
def _(positions: Tensor, frequencies: Tensor, gain: float) -> Tensor:
    del gain
    return positions.new_empty((*positions.shape, 2, frequencies.shape[0]), dtype=torch.float32)


@torch.library.register_fake("tilewright::rope_rotate_")
def _(x: Tensor, angles: Tensor, scales: Tensor | None) -> None:
    del scales
    torch._check(x.dim() == 3 and angles.dim() == 3, lambda: "x must be [T, H, D] and angles [T, 2, D/2]")


@torch.library.register_fake("tilewright::gated_squared_relu")
@torch.library.register_fake("tilewright::gated_activation")
def _(gate: Tensor, up: Tensor) -> Tensor:
    torch._check(gate.shape == up.shape, lambda: "gate and up must have one shape")
    return gate.new_empty(gate.shape)
