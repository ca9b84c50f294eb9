# SPDX-License-Identifier: Apache-2.0
"""A gated MLP whose neurons are dropped below a threshold of the gate activation (CATS, arXiv 2404.08763)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tilewright.ops.sparse_gated_mlp import ACTS, Act, cats_activation, sparse_gated_mlp

# Up to so many tokens the operator reads less than dense products do; beyond, dense products reuse what they read.
DECODE_TOKENS = 16


class CATSMLP(nn.Module):
    """``down(cats_activation(gate(x), threshold) * up(x))`` over three linears.

    A few tokens, without gradients, through plain ``nn.Linear`` layers of float32 or bfloat16 on the CPU: by
    :func:`tilewright.ops.sparse_gated_mlp`, which reads only the rows of up and down that a token keeps. Everything
    else (prompts, training, adapters, low-bit layers): by the layers themselves and the thresholded activation. Both
    compare the gate before it is rounded to bfloat16.

    Args:
        gate_proj, up_proj, down_proj: layers [..., D] -> [..., M], the same, [..., M] -> [..., D].
        threshold: [] or [M], at least 0.
        act: "silu", "gelu", "gelu_tanh" or "relu".
    """

    # Any: the linears may be adapters or low-bit layers, whose attributes _plain asks for first.
    gate_proj: Any
    up_proj: Any
    down_proj: Any
    threshold: Tensor

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, threshold: Tensor, act: Act = "silu"
    ) -> None:
        super().__init__()
        if act not in ACTS:
            raise ValueError(f"CATSMLP: act = {act!r}, needed one of {', '.join(map(repr, ACTS))}")
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.act: Act = act
        threshold = torch.as_tensor(threshold).detach().to(torch.float32).clone()
        self.register_buffer("threshold", threshold, persistent=False)
        self._transposed: tuple[Any, Tensor] | None = None

    @classmethod
    def from_dense(cls, mlp: nn.Module, threshold: Tensor | float) -> CATSMLP:
        """Over the layers of a gated MLP with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn`` (or ``act``).

        Raises:
            ValueError: the module has no such layers, or an activation that is none of ours.
        """
        missing = [name for name in ("gate_proj", "up_proj", "down_proj") if not hasattr(mlp, name)]
        if missing:
            raise ValueError(f"{type(mlp).__name__} has no {missing[0]}; CATS needs a gated MLP")
        function: Any = getattr(mlp, "act_fn", None) or getattr(mlp, "act", None)
        parts: Any = mlp
        return cls(parts.gate_proj, parts.up_proj, parts.down_proj, torch.as_tensor(threshold), act_name(function))

    def extra_repr(self) -> str:
        """Act and threshold."""
        shown = f"{float(self.threshold):.4g}" if self.threshold.dim() == 0 else f"[{self.threshold.numel()}]"
        return f"act={self.act}, threshold={shown}"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to [..., D]."""
        if self._reads_rows(x):
            gate, up, down = self.gate_proj, self.up_proj, self.down_proj
            bias = (gate.bias, up.bias, down.bias)
            y = sparse_gated_mlp(x, gate.weight, up.weight, self._down_t(), self.threshold, self.act, bias)
            assert isinstance(y, Tensor)
            return y
        a = cats_activation(self._gate(x), self.threshold, self.act)
        up_x = self.up_proj(x)
        out: Tensor = self.down_proj((a * up_x).to(up_x.dtype))
        return out

    def _gate(self, x: Tensor) -> Tensor:
        """The gate's output, in float32 where the layer would round it to a narrower type."""
        gate = self.gate_proj
        if _plain(gate) and gate.weight.dtype.itemsize < 4:
            bias = None if gate.bias is None else gate.bias.float()
            return linear(x.float(), gate.weight.float(), bias)
        z: Tensor = gate(x)
        return z

    def _reads_rows(self, x: Tensor) -> bool:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        return (
            x.device.type == "cpu"
            and x.numel() <= DECODE_TOKENS * x.shape[-1]
            and all(_plain(layer) for layer in layers)
            and self.gate_proj.weight.dtype in (torch.float32, torch.bfloat16)
            and not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())))
        )

    def _down_t(self) -> Tensor:
        """W_down^T, made once for each value of the weight."""
        weight = self.down_proj.weight
        key = (weight.data_ptr(), weight._version, weight.dtype)
        if self._transposed is None or self._transposed[0] != key:
            self._transposed = (key, weight.detach().T.contiguous())
        return self._transposed[1]


def _plain(layer: nn.Module) -> bool:
    """A torch linear that no hook looks at: its weight may be read in its stead."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


_FUNCTIONS: dict[Act, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


def act_name(function: Callable[[Tensor], Tensor] | None) -> Act:
    """Which of our activations a function is, found by what it computes.

    Raises:
        ValueError: it is none of them.
    """
    probe = torch.linspace(-6, 6, 97)
    if function is not None:
        with torch.no_grad():
            got = function(probe)
        for name, known in _FUNCTIONS.items():
            # Far above rounding; the two forms of GELU differ by 4.7e-4.
            if got.shape == probe.shape and torch.allclose(got, known(probe), rtol=0.0, atol=1e-5):
                return name
    what = "no activation" if function is None else f"the activation {getattr(function, '__name__', function)}"
    raise ValueError(f"the MLP has {what}; CATS knows {', '.join(ACTS)}")


def activation(name: Act, x: Tensor) -> Tensor:
    """act(x) by torch."""
    return _FUNCTIONS[name](x)
