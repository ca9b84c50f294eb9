# SPDX-License-Identifier: Apache-2.0
"""The same layer in float64 without the accelerator's roundings but for the quantizer's: an independent oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract import Layer, Linear

Float = NDArray[Any]
"""float64 inside; float16 is widened."""


def softmax_attention(q: Float, k: Float, v: Float, first: int = 0) -> Float:
    """Causal attention of q `[T, H, D]` at ``first`` over k, v `[first + T, Hkv, D]`, float64."""
    q, k, v = (part.astype(np.float64) for part in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])
    scores = np.where(np.arange(len(k))[None] <= first + np.arange(len(q))[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v)


def bitlinear(x: Float, linear: Linear, norm: NDArray[np.float16] | None, eps: float) -> Float:
    """BitLinear: RMS norm, per-token INT8, ternary product, both scales."""
    if norm is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * norm.astype(np.float64)
    s = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    return np.rint(x * 127 / s) * s * float(linear.scale) @ linear.weights.unpack().astype(np.float64).T


def rotate(heads: Float, base: float = 10000.0) -> Float:
    """RoPE on neighbouring pairs of `[T, H, D]` from position 0 on."""
    size = heads.shape[2]
    theta = np.arange(len(heads))[:, None] * base ** (-np.arange(0, size, 2) / size)
    a, b = heads[..., 0::2], heads[..., 1::2]
    cosine, sine = np.cos(theta)[:, None], np.sin(theta)[:, None]
    return np.stack([a * cosine - b * sine, b * cosine + a * sine], -1).reshape(heads.shape)


def decoder_layer(x: Float, layer: Layer, base: float = 10000.0) -> Float:
    """A prompt `[T, width]` through a layer."""
    heads = (len(x), -1, layer.head_size)
    x = x.astype(np.float64)
    q, k, v = (bitlinear(x, one, layer.q.norm, layer.eps).reshape(heads) for one in (layer.q, layer.k, layer.v))
    mixed = softmax_attention(rotate(q, base), rotate(k, base), v).reshape(len(x), -1)
    x = x + bitlinear(mixed, layer.o, layer.o.norm, layer.eps)
    gate, up = (bitlinear(x, one, layer.gate.norm, layer.eps) for one in (layer.gate, layer.up))
    gated = gate / (1 + np.exp(-gate)) if layer.gate_map == "silu" else np.maximum(gate, 0) ** 2
    return x + bitlinear(gated * up, layer.down, layer.down.norm, layer.eps)
