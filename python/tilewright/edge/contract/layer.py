# SPDX-License-Identifier: Apache-2.0
"""A decoder layer: which units a row passes, and where it is rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract import rows, softmax, weights
from tilewright.edge.contract.half import Half, Int
from tilewright.edge.contract.scale import Factor
from tilewright.edge.contract.status import StatusRegister
from tilewright.edge.contract.weights import Int8, Int32, TlmmWeights


class Units(Protocol):
    """The units that a layer is made of: this package's functions, HLS simulation, or verilated RTL."""

    @property
    def tlmm(self) -> Callable[..., Int32]: ...

    @property
    def rms_max(self) -> Callable[..., tuple[Half, Int]]: ...

    @property
    def row_max(self) -> Callable[..., Int]: ...

    @property
    def quantize(self) -> Callable[..., tuple[Int8, Int]]: ...

    @property
    def dequant_fuse(self) -> Callable[..., Half]: ...

    @property
    def attention(self) -> Callable[..., Half]: ...


class PythonUnits:
    """The contract's own functions."""

    tlmm = staticmethod(weights.tlmm)
    rms_max = staticmethod(rows.rms_max)
    row_max = staticmethod(rows.row_max)
    quantize = staticmethod(rows.quantize)
    dequant_fuse = staticmethod(rows.dequant_fuse)
    attention = staticmethod(softmax.attention)


@dataclass(frozen=True)
class Linear:
    """A ternary matrix, its gamma / 127, and the RMS norm in front of it; None: the row goes to the quantizer."""

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
        shape = (capacity, kv_heads, head_size)
        return cls(np.zeros(shape, np.float16), np.zeros(shape, np.float16))

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
    if first + tokens > min(len(cache.k), len(angles)):
        raise ValueError(
            f"decoder_layer: {first + tokens} tokens, the cache has capacity {len(cache.k)} and angles {len(angles)}"
        )

    def enter(row: Half, linear: Linear) -> tuple[Int8, Int]:
        if linear.norm is None:
            return units.quantize(row, units.row_max(row, status=status), status=status)
        constants = rows.NormConstants.of(row.shape[1], layer.eps)
        normed, largest = units.rms_max(row, linear.norm, constants, status=status)
        return units.quantize(normed, largest, status=status)

    def through(
        entered: tuple[Int8, Int], linear: Linear, mode: str = "bypass", side: NDArray[Any] | None = None
    ) -> Half:
        acc = units.tlmm(entered[0], linear.weights, status=status)
        return units.dequant_fuse(acc, entered[1], linear.scale, mode, side, status=status)

    entered = enter(x, layer.q)
    here = angles[first : first + tokens]
    heads = (tokens, -1, layer.head_size)
    q = through(entered, layer.q, "rope", here).reshape(heads)
    k = through(entered, layer.k, "rope", here).reshape(heads)
    cache.append(k, through(entered, layer.v).reshape(heads))
    mixed = units.attention(q, cache.k[: cache.seen], cache.v[: cache.seen], first=first, status=status)
    x = through(enter(mixed.reshape(tokens, -1), layer.o), layer.o, "residual", x)
    entered = enter(x, layer.gate)
    gated = through(entered, layer.up, layer.gate_map, through(entered, layer.gate))
    return through(enter(gated, layer.down), layer.down, "residual", x)
