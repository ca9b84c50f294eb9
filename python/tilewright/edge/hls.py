# SPDX-License-Identifier: Apache-2.0
"""C simulation of the HLS units, with the interface of :mod:`tilewright.edge.contract`'s functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract.half import Half, Int, as_half
from tilewright.edge.contract.rows import FUSE_MODES, NormConstants
from tilewright.edge.contract.scale import Factor
from tilewright.edge.contract.softmax import score_factor
from tilewright.edge.contract.status import Status, StatusRegister
from tilewright.edge.contract.stream import beats_of
from tilewright.edge.contract.weights import Int8, Int32, Tiling, TlmmWeights


def _module() -> Any:
    from tilewright import _host

    if not hasattr(_host, "hls"):
        raise RuntimeError("tilewright._host was built without the HLS units: build again with `pip install .`")
    return _host.hls


def points() -> dict[tuple[int, int, int, int], Any]:
    """The compiled (G, T, Q, P) and their simulations."""
    module = _module()
    return {tuple(p.tiling): p for name, p in vars(module).items() if name.startswith("Point")}


def _bits(x: Half, name: str) -> NDArray[np.uint16]:
    return np.ascontiguousarray(as_half(x, name)).view(np.uint16)


def _half(bits: NDArray[np.uint16]) -> Half:
    return bits.view(np.float16)


def _report(status: StatusRegister | None, value: int) -> None:
    if status is not None:
        status.set(Status(value), value)


class HlsUnits:
    """The units at one point of parameters, simulated one after the other.

    Args:
        tiling: one of :func:`points`.

    Attributes:
        traffic: (key rows, value rows) that attention has read from external memory.
    """

    def __init__(self, tiling: Tiling | None = None) -> None:
        self.tiling = tiling or Tiling()
        key = (self.tiling.g, self.tiling.t, self.tiling.q, self.tiling.p)
        known = points()
        if key not in known:
            raise ValueError(f"HlsUnits: (G, T, Q, P) = {key} is not compiled; there are {sorted(known)}")
        self.point = known[key]
        self.traffic = [0, 0]
        self._hls = _module()
        self._beats: dict[int, tuple[TlmmWeights, NDArray[np.uint8]]] = {}

    def beats(self, weights: TlmmWeights) -> NDArray[np.uint8]:
        """The weight's stream, made once."""
        found = self._beats.get(id(weights))
        if found is None or found[0] is not weights:
            found = (weights, beats_of(weights, None, self.point.beat_bits))
            self._beats[id(weights)] = found
        return found[1]

    def tlmm(self, x: Int8, weights: TlmmWeights, status: StatusRegister | None = None) -> Int32:
        """Loader, gearbox and TLMM."""
        if weights.tiling != self.tiling:
            raise ValueError(f"tlmm: the weights are packed for {weights.tiling}, this is {self.tiling}")
        x = np.asarray(x)
        if x.dtype != np.int8:
            raise ValueError(f"tlmm: x is {x.dtype}, needed int8")
        acc, bits = self.point.tlmm(x, self.beats(weights), weights.inputs, weights.outputs, 0)
        _report(status, bits)
        return np.asarray(acc)

    def rms_max(
        self, x: Half, weight: Half, constants: NormConstants, status: StatusRegister | None = None
    ) -> tuple[Half, Int]:
        y, largest, bits = self._hls.rms_max(_bits(x, "x"), _bits(weight, "weight"), constants.eps)
        _report(status, bits)
        return _half(y), largest

    def row_max(self, x: Half, status: StatusRegister | None = None) -> Int:
        _, largest, bits = self._hls.rms_max(_bits(x, "x"), None, 0)
        _report(status, bits)
        return np.asarray(largest)

    def quantize(self, x: Half, largest: Int, status: StatusRegister | None = None) -> tuple[Int8, Int]:
        q, scale, bits = self._hls.quantize(_bits(x, "x"), largest)
        _report(status, bits)
        return q, scale

    def dequant_fuse(
        self,
        acc: Int32,
        scale: Int,
        weight_scale: Factor,
        mode: str = "bypass",
        side: NDArray[Any] | None = None,
        status: StatusRegister | None = None,
    ) -> Half:
        """As :func:`tilewright.edge.contract.dequant_fuse`."""
        acc = np.ascontiguousarray(acc, np.int32)
        partner = angles = None
        if mode == "rope" and side is not None:
            heads = acc.shape[1] // (2 * side.shape[1])
            angles = np.ascontiguousarray(np.broadcast_to(side[:, None], (len(side), heads, *side.shape[1:])))
        elif side is not None:
            partner = _bits(side, "side")
        y, bits = self._hls.dequant_fuse(
            acc, scale, weight_scale.mantissa, weight_scale.exponent, FUSE_MODES.index(mode), partner, angles
        )
        _report(status, bits)
        return _half(y)

    def linear(
        self,
        x: Half,
        weights: TlmmWeights,
        norm: Half | None,
        eps: float,
        scale: Factor,
        *,
        depth: int = 2,
        row_depth: int | None = None,
        seed: int = 0,
        status: StatusRegister | None = None,
    ) -> tuple[Half, dict[str, int]]:
        """Norm to dequantizer as one dataflow region: processes run concurrently over streams of bounded depth.

        Args:
            depth: of the streams. row_depth: of the one that holds a normed row until its maximum is known; a row's
                beats when None, with fewer the region deadlocks.
            seed: the order in which processes are run; it must not matter.

        Returns:
            float16 `[tokens, outputs]` and the most items that each stream held.

        Raises:
            RuntimeError: deadlock, with who waits for which stream.
        """
        if row_depth is None:
            row_depth = -(-x.shape[1] // 16)
        beats = beats_of(weights, norm, self.point.beat_bits)
        y, bits, most = self.point.linear(
            _bits(x, "x"),
            beats,
            weights.inputs,
            weights.outputs,
            0 if norm is None else len(norm),
            NormConstants.of(x.shape[1], eps).eps,
            scale.mantissa,
            scale.exponent,
            depth,
            row_depth,
            seed,
        )
        _report(status, bits)
        return _half(y), most

    def attention(
        self,
        q: Half,
        k: Half,
        v: Half,
        *,
        first: int = 0,
        factor: Factor | None = None,
        status: StatusRegister | None = None,
    ) -> Half:
        """RPA for a prompt (``first`` 0 and more than one token), DA token by token otherwise."""
        tokens, heads, size = q.shape
        factor = factor or score_factor(size)
        flat = [_bits(part, name).reshape(len(part), -1) for part, name in ((q, "q"), (k, "k"), (v, "v"))]
        prefill = first == 0 and tokens > 1
        out, bits, traffic = self.point.attention(
            *flat, heads, k.shape[1], factor.mantissa, factor.exponent, first, prefill
        )
        self.traffic = [a + b for a, b in zip(self.traffic, traffic, strict=True)]
        _report(status, bits)
        return _half(out).reshape(q.shape)
