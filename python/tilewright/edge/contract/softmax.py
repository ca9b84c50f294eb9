# SPDX-License-Identifier: Apache-2.0
"""Causal attention by an online softmax in powers of two: integers only, one recurrence for prefill and decode."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tilewright.edge.contract.half import Half, Int, align, as_half, bit_length, pack
from tilewright.edge.contract.scale import Factor
from tilewright.edge.contract.status import Status, StatusRegister
from tilewright.edge.contract.tables import EXP2_FRACTION_BITS, exp2_fraction

KEY_BITS = 17
VALUE_BITS = 14
DOT_DROP = 16
SCORE_BITS = 28
WEIGHT_SHIFT = 5
MAX_CONTEXT = 4096
MAX_HEAD_SIZE = 256
LOWEST = -(1 << 13)
LOWEST_VALUE = LOWEST - 32
OUTPUT_DROP = 8


def score_factor(head_size: int, scale: float | None = None) -> Factor:
    """log2(e) times the softmax scale, which is 1 / sqrt(head_size) when not given."""
    return Factor.of(math.log2(math.e) * (head_size**-0.5 if scale is None else scale))


@dataclass
class _State:
    """Of each query and head: largest integer score, sum of weights, the values' reference, their weighted sum."""

    top: Int
    total: Int
    value_top: Int
    sums: Int


def _shift(value: Int, by: Int) -> Int:
    return value >> np.minimum(by, 63)


def scores(q: Int, q_top: Int, k: Int, k_top: Int, factor: Factor, status: StatusRegister | None = None) -> Int:
    """Fixed-point scores: log2 of the softmax weight, 14 bits behind the point, 28 in all, rounded down."""
    dot = (q * k).sum(-1) >> DOT_DROP
    shift = q_top + k_top - 2 * (KEY_BITS - 11) + DOT_DROP + factor.exponent + EXP2_FRACTION_BITS
    product = dot * factor.mantissa
    limit = 1 << (SCORE_BITS - 1)
    wide = np.where(shift < 0, _shift(product, np.maximum(-shift, 0)), product << np.clip(shift, 0, 18))
    if status is not None:
        status.set(Status.SCORE_CLAMP, ((wide < -limit) | (wide >= limit)).any())
    return np.clip(wide, -limit, limit - 1)


def _step(state: _State, score: Int, v: Int, v_top: Int) -> _State:
    whole, weight = score >> EXP2_FRACTION_BITS, exp2_fraction(score & ((1 << EXP2_FRACTION_BITS) - 1)) << WEIGHT_SHIFT
    top = np.maximum(state.top, whole)
    total = _shift(state.total, top - state.top) + _shift(weight, top - whole)
    value_top = np.maximum(state.value_top, whole + v_top)
    scaled = _shift(weight, value_top - whole - v_top)
    sums = _shift(state.sums, (value_top - state.value_top)[..., None]) + scaled[..., None] * v
    return _State(top, total, value_top, sums)


def _finish(state: _State, status: StatusRegister | None) -> Half:
    length = bit_length(state.total)
    reciprocal = ((1 << 33) - 1) // (state.total >> (length - 17))
    exponent = state.value_top - state.top - length - 19 + OUTPUT_DROP
    return pack((state.sums >> OUTPUT_DROP) * reciprocal[..., None], exponent[..., None], status)


def attention(
    q: Half, k: Half, v: Half, *, first: int = 0, factor: Factor | None = None, status: StatusRegister | None = None
) -> Half:
    """Causal attention of queries first .. first + tokens - 1 over keys 0 .. first + tokens - 1.

    A query's keys are taken from its own position down to 0, so the result depends neither on how many queries are
    processed together nor on whether they came as a prompt or one by one.

    Args:
        q: float16 `[tokens, heads, head_size]`. k, v: float16 `[first + tokens, kv_heads, head_size]`.

    Raises:
        ValueError: shapes that do not fit together, or beyond 4096 keys or a head of 256.
    """
    q, k, v = as_half(q, "q"), as_half(k, "k"), as_half(v, "v")
    if q.ndim != 3 or k.shape != v.shape or k.ndim != 3 or k.shape[0] != first + q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape} at {first}, needed [T, H, D] and [first + T, Hkv, D]"
        )
    tokens, heads, size = q.shape
    if k.shape[1] == 0 or heads % k.shape[1] or size > MAX_HEAD_SIZE or k.shape[0] > MAX_CONTEXT:
        raise ValueError(
            f"attention: {heads} heads of {size} over {k.shape[1]} for {k.shape[0]} keys, needed a multiple of the key "
            f"heads, a head size up to {MAX_HEAD_SIZE}, up to {MAX_CONTEXT} keys"
        )
    factor = factor or score_factor(size)
    group = heads // k.shape[1]
    qi, q_top = align(q, KEY_BITS, status)
    ki, k_top = align(k, KEY_BITS, status)
    vi, v_top = align(v, VALUE_BITS, status)
    ki, vi = ki.repeat(group, 1), vi.repeat(group, 1)
    k_top, v_top = k_top.repeat(group, 1), v_top.repeat(group, 1)
    full = np.zeros((tokens, heads), np.int64)
    state = _State(full + LOWEST, full, full + LOWEST_VALUE, np.zeros(q.shape, np.int64))
    for key in range(k.shape[0] - 1, -1, -1):
        at = slice(max(key - first, 0), None)
        old = _State(state.top[at], state.total[at], state.value_top[at], state.sums[at])
        score = scores(qi[at], q_top[at], ki[key], k_top[key], factor, status)
        new = _step(old, score, vi[key], v_top[key])
        for name in ("top", "total", "value_top", "sums"):
            getattr(state, name)[at] = getattr(new, name)
    return _finish(state, status)
