# SPDX-License-Identifier: Apache-2.0
"""Inputs for the accelerator's units: ordinary ones, and those that make arithmetic fail."""

from __future__ import annotations

import numpy as np

from tilewright.edge.contract import Factor, Layer, Linear, Tiling, pack_tlmm

POINTS = [Tiling(3, 28, 16, 4), Tiling(3, 4, 4, 2), Tiling(2, 3, 2, 1), Tiling(3, 7, 10, 3)]
POINT_IDS = [f"{t.g}-{t.t}-{t.q}-{t.p}" for t in POINTS]


def halves(rng: np.random.Generator, *shape: int, spread: float = 3.0) -> np.ndarray:
    """float16 of both signs over 2 * spread decades, with zeros of both signs and subnormals among them."""
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-spread, spread, shape)
    x = np.where(rng.random(shape) < 0.05, 0.0, x)
    x = np.where(rng.random(shape) < 0.05, -0.0, x)
    return np.clip(x, -60000, 60000).astype(np.float16)


def adversarial_rows(width: int) -> np.ndarray:
    """float16 `[rows, width]`: zeros, the smallest, the largest, one outlier, exact ties, exceptional values."""
    rows = np.zeros((9, width), np.float16)
    rows[1] = np.float16(6e-8)
    rows[2] = np.float16(65504)
    rows[3] = -np.float16(65504)
    rows[4] = np.float16(1e-3)
    rows[4, width // 2] = 60000
    # With 127 as the maximum every half is a tie.
    rows[5] = (np.arange(width) % 254 / 2 - 63.5).astype(np.float16)
    rows[5, 0] = 127
    rows[6] = np.where(np.arange(width) % 2 == 0, 1, -1)
    rows[7, 0], rows[7, -1] = np.nan, np.inf
    rows[8] = -np.inf
    return rows


def small_layer(rng: np.random.Generator, tiling: Tiling, gate_map: str = "silu", norms: int = 4) -> Layer:
    """Width 24, four query heads over two, 41 gates: sizes that no tile divides."""
    d, f, heads, kv_heads, size = 24, 41, 4, 2, 8

    def linear(inputs: int, outputs: int, norm: bool) -> Linear:
        weight = pack_tlmm(rng.integers(-1, 2, (outputs, inputs)).astype(np.int8), tiling)
        scale = Factor.of(0.7 / np.sqrt(inputs) / 127)
        return Linear(weight, scale, (1 + 0.1 * rng.standard_normal(inputs)).astype(np.float16) if norm else None)

    return Layer(
        q=linear(d, heads * size, True),
        k=linear(d, kv_heads * size, False),
        v=linear(d, kv_heads * size, False),
        o=linear(heads * size, d, norms == 4),
        gate=linear(d, f, True),
        up=linear(d, f, False),
        down=linear(f, d, norms == 4),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        eps=1e-5,
        gate_map=gate_map,
    )
