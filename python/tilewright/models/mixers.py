# SPDX-License-Identifier: Apache-2.0
"""What a layer of the decode engine does in place of softmax attention over all positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

HeadFunction = Literal[
    "softmax",
    "softmax_pair",
    "exp_pair",
    "capped_exp_pair",
    "joint_softmax",
    "elu",
    "relu",
    "log_sigmoid",
    "sigmoid",
    "complement",
    "unit_norm",
    "silu",
]
FUNCTIONS: tuple[str, ...] = get_args(HeadFunction)
"""In the order of csrc/ops/feature_map/kernels.h, which defines them."""
_PAIRS = ("softmax_pair", "exp_pair", "capped_exp_pair", "joint_softmax")


@dataclass(frozen=True)
class HeadMap:
    """``factor * function(W^T x + b)`` of every head's vector x [D]; without a weight, of x + b.

    Attributes:
        function: one of :data:`FUNCTIONS`; pairs give twice as many features as they read.
        weight: name of the parameter W [heads, D, n] (or [1, D, n], shared).
        bias: name of the parameter b [heads, n] (or [1, n]).
        heads: heads of the result, a multiple of the heads that x has; None: as many.
        factor: on the result.
        cap: for "capped_exp_pair", the largest magnitude that is exponentiated.

    Raises:
        ValueError: an unknown function.
    """

    function: HeadFunction
    weight: str | None = None
    bias: str | None = None
    heads: int | None = None
    factor: float = 1.0
    cap: float = 0.0

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(f"HeadMap: function={self.function!r}, needed one of {', '.join(FUNCTIONS)}")

    def features(self, inner: int) -> int:
        """Features of a head that the function makes of n = ``inner`` values."""
        return 2 * inner if self.function in _PAIRS else inner


@dataclass(frozen=True)
class Window:
    """Softmax attention over the last ``size`` tokens, the query's own included, beside linear attention.

    Attributes:
        mix: name of a parameter [heads] of positive numbers: the window's weights are multiplied by it and divided,
            together with the linear ones, by one sum; linear attention then reads only what has left the window. None:
            the layer's output is ``linear_factor * linear + window_factor * window``.
    """

    size: int
    mix: str | None = None
    linear_factor: float = 0.5
    window_factor: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Window: size={self.size}, needed at least 1")


@dataclass(frozen=True)
class LinearMixer:
    """Linear attention, ``S <- diag(exp(g)) S + k v^T`` and ``o = scale S^T q``, with feature maps, gates and window.

    The state is of one size at every position. Values are the layer's own, queries and keys what the maps make of them.

    Attributes:
        query, key: maps to what the recurrence reads.
        gate: map of the key projection to log decays, one a channel of the mapped key; None: no decay.
        after_rotation: the maps (not the gate) see rotated queries and keys.
        normalize: divide by the sum of weights plus eps.
        window: softmax attention over recent tokens, with rotated queries and keys.
    """

    query: HeadMap
    key: HeadMap
    gate: HeadMap | None = None
    after_rotation: bool = False
    scale: float = 1.0
    normalize: bool = False
    eps: float = 0.0
    window: Window | None = None

    def __post_init__(self) -> None:
        shared = self.window is not None and self.window.mix is not None
        if shared and not self.normalize:
            raise ValueError("LinearMixer: a window that shares the denominator needs normalize=True")
        if self.gate is not None and (shared or self.after_rotation):
            raise ValueError(
                "LinearMixer: a gate is computed from keys before their rotation, as they come; it does not go "
                "with after_rotation or a shared window"
            )

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the parameters that this layer has beside its projections."""
        maps = [m for m in (self.query, self.key, self.gate) if m is not None]
        names = [name for m in maps for name in (m.weight, m.bias)] + [None if self.window is None else self.window.mix]
        return tuple(name for name in names if name is not None)
