# SPDX-License-Identifier: Apache-2.0
"""What stands between a decoder's linears, in the decode engine's arithmetic: the same bits from the same inputs."""

from __future__ import annotations

from torch import Tensor, nn

from tilewright.ops import token_ops


class RMSNorm(nn.Module):
    """:func:`tilewright.ops.token_ops.rms_norm` with a weight [K]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.detach().clone(), requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to the same shape and dtype."""
        return token_ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedMLP(nn.Module):
    """``down(norm(act(gate(x)) * up(x)))`` over three linears; ``ffn_sub_norm`` is None, or a norm (BitNet's).

    act: "silu", or "relu2", the squared ReLU.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act: str = "silu") -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act = gate_proj, up_proj, down_proj, act
        self.ffn_sub_norm: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., K]."""
        inner = token_ops.gated_activation(self.gate_proj(x), self.up_proj(x), self.act)
        y: Tensor = self.down_proj(inner if self.ffn_sub_norm is None else self.ffn_sub_norm(inner))
        return y


class RotaryAngles(nn.Module):
    """Cosines and sines for every pair of channels, in transformers' form: the second half repeats the first.

    Args:
        frequencies: float32 [D/2], radians a position.
        gain: a factor on both.
    """

    frequencies: Tensor

    def __init__(self, frequencies: Tensor, gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.gain = gain

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, T] to cosines and sines [B, T, D], in the dtype of x."""
        angles = token_ops.rope_angles(position_ids, self.frequencies, self.gain).to(x.dtype)
        cosines, sines = angles.repeat(*([1] * (angles.dim() - 1)), 2).unbind(-2)
        return cosines, sines
