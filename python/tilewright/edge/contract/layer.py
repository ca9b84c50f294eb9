# SPDX-License-Identifier: Apache-2.0
"""A decoder layer: which units a row passes, and where it is rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract import rows, softmax, weights
from tilewright.edge.contract.half import Half, Int
from tilewright.edge.contract.scale import Factor
from tilewright.edge.contract.status import StatusRegister
from tilewright.edge.contract.weights import Int8, Int32, TlmmWeights


class Units(Protocol):
    """The units that a layer is made of: this package's functions, HLS simulation, or verilated RTL."""

    tlmm: Callable[..., Int32]
    rms_max: Callable[..., tuple[Half, Int]]
    row_max: Callable[..., Int]
    quantize: Callable[..., tuple[Int8, Int]]
    dequantize: Callable[..., Half]
    rope: Callable[..., Half]
    silu_multiply: Callable[..., Half]
    squared_relu_multiply: Callable[..., Half]
    residual_add: Callable[..., Half]
    attention: Callable[..., Half]


class PythonUnits:
    """The contract's own functions."""

    tlmm = staticmethod(weights.tlmm)
    rms_max = staticmethod(rows.rms_max)
    row_max = staticmethod(rows.row_max)
    quantize = staticmethod(rows.quantize)
    dequantize = staticmethod(rows.dequantize)
    rope = staticmethod(rows.rope)
    silu_multiply = staticmethod(rows.silu_multiply)
    squared_relu_multiply = staticmethod(rows.squared_relu_multiply)
    residual_add = staticmethod(rows.residual_add)
    attention = staticmethod(softmax.attention)


@dataclass(frozen=True)
class Linear:
    """A ternary matrix, its gamma / 127, and the RMS norm in front of it (None: the row goes straight to the quantizer)."""

    weights: TlmmWeights
    scale: Factor
    norm: Half | None = None


@dataclass(frozen=True)
class Layer:
    """One decoder layer. q's and k's rows are in :func:`rope_order`; k, v and up take their input from q's and gate's
    norm. ``gate_map`` is "silu" or "squared_relu"."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    gate_map: str = "silu"


@dataclass
class KvCache:
    """Keys and values of a layer, oldest first: float16 `[tokens, kv_heads, head_size]`.

    In external memory position t is at row capacity - 1 - t, so that newest to oldest is an incrementing burst.
    """

    k: Half
    v: Half
    seen: int = field(default=0)

    @classmethod
    def empty(cls, capacity: int, kv_heads: int, head_size: int) -> KvCache:
        return cls(*(np.zeros((capacity, kv_heads, head_size), np.float16) for _ in range(2)))

    def append(self, k: Half, v: Half) -> None:
        """Raises ValueError when the cache is full."""
        end = self.seen + len(k)
        if end > len(self.k):
            raise ValueError(f"KvCache: {end} tokens, capacity {len(self.k)}")
        self.k[self.seen : end], self.v[self.seen : end] = k, v
        self.seen = end


def decoder_layer(
    x: Half,
    layer: Layer,
    cache: KvCache,
    angles: NDArray[np.int16],
    units: Units | None = None,
    status: StatusRegister | None = None,
) -> Half:
    """The layer's output for new tokens, which are appended to the cache; as a prompt or one by one it is the same.

    Args:
        x: float16 `[tokens, width]`. angles: :func:`rope_table` from position 0 on.
    """
    units = units or PythonUnits()
    tokens, first = len(x), cache.seen

    def enter(row: Half, linear: Linear) -> tuple[Int8, Int]:
        if linear.norm is None:
            return units.quantize(row, units.row_max(row, status=status), status=status)
        constants = rows.NormConstants.of(row.shape[1], layer.eps)
        normed, largest = units.rms_max(row, linear.norm, constants, status=status)
        return units.quantize(normed, largest, status=status)

    def through(entered: tuple[Int8, Int], linear: Linear) -> Half:
        acc = units.tlmm(entered[0], linear.weights, status=status)
        return units.dequantize(acc, entered[1], linear.scale, status=status)

    entered = enter(x, layer.q)
    here = angles[first : first + tokens]
    q, k, v = (through(entered, linear).reshape(tokens, -1, layer.head_size) for linear in (layer.q, layer.k, layer.v))
    q, k = units.rope(q, here, status=status), units.rope(k, here, status=status)
    cache.append(k, v)
    mixed = units.attention(q, cache.k[: cache.seen], cache.v[: cache.seen], first=first, status=status)
    x = units.residual_add(x, through(enter(mixed.reshape(tokens, -1), layer.o), layer.o), status=status)
    entered = enter(x, layer.gate)
    gate, up = through(entered, layer.gate), through(entered, layer.up)
    gated = (units.silu_multiply if layer.gate_map == "silu" else units.squared_relu_multiply)(gate, up, status=status)
    return units.residual_add(x, through(enter(gated, layer.down), layer.down), status=status)
