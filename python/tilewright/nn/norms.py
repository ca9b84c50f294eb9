# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square norms that train, with and without a gate. Sums are in float32 (float64 for float64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GateActivation = Literal["silu", "sigmoid"]
_GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """``w o x / sqrt(mean(x^2) + eps)`` over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).

    For frozen weights and the decode engine's bits there is :class:`tilewright.nn.RMSNorm`.

    Args:
        size: of the last dimension.
        eps: inside the square root.
    """

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights of one."""
        del generator
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] to the same shape and dtype."""
        return (_normalized(x, self.eps) * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """``w o x / sqrt(mean(x^2) + eps) o act(gate)``: the norm before the output projection of gated mixers.

    Args:
        size: of the last dimension, for instance one head.
        eps: inside the square root.
        activation: "silu" (RetNet, GLA, Gated DeltaNet) or "sigmoid" (Kimi Delta Attention).

    Raises:
        ValueError: activation is another word.
    """

    def __init__(self, size: int, eps: float = 1e-5, activation: GateActivation = "silu") -> None:
        super().__init__(size, eps)
        if activation not in _GATES:
            raise ValueError(f"GatedRMSNorm: activation = {activation!r}, needed one of {', '.join(_GATES)}")
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """x and gate [..., size] to the same shape and x's dtype."""
        return (_normalized(x, self.eps) * self.weight * _GATES[self.activation](wide(gate))).to(x.dtype)


class SimpleRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps)`` without weights (TransNormer, arXiv 2307.14995, section 3.1)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] to the same shape and dtype."""
        return _normalized(x, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"


def _normalized(x: Tensor, eps: float) -> Tensor:
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
