# SPDX-License-Identifier: Apache-2.0
"""Attention in float64 over the values that a cache holds, and how far a kernel may be from it.

Bound, for one query and one output element d, with w the exact weights, v the values and u = 2^-24:

- A score is a float32 sum of D products, times three rounded factors: off by at most gamma_{D+8} A, A the largest
  |scale| * sum |q_d k_d| of the keys it sees. Where the float query is a sum of two bfloat16 (level avx512_bf16), what
  the two leave over adds 2^-16 A. The argument of the exponential, a difference of two such numbers, rounds once more.
  So a weight is off by a factor e^(+-E) with E = 2 (gamma_{D+10} + 2^-16) A; a shift common to all keys cancels.
- The exponential is off by 2^-22 of itself (1.5e-7 from the polynomial, the rest to spare). It enters a weight once,
  and once more for each later tile or chunk of keys that raises the maximum: 2 + n/32 times at most.
- At avx512_bf16 a weight times its value scale is rounded to bfloat16: 2^-8 of itself, in the numerator only.
- Sums over n keys, with a correction for each of the tiles: gamma_{n + n/32 + 16} in numerator and denominator.

Numerator and denominator are sums of positive multiples of |v| and 1, and |out| <= sum w |v|, hence

    |error| <= (2 (e^E - 1 + (2 + n/32) 2^-22) + 2^-8 [bf16] + 2 gamma) (1 + 2^-6) sum_j w_j |v_jd|

where the last factor covers second-order terms. Below 2^-126 weights become zero: n 2^-120 max(1, max|v|) more.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from tilewright.ops import KVCache
from tilewright.reference.low_bit import round_e4m3
from tilewright.testing import UNIT_ROUNDOFF


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of the operator that change what it computes."""

    scale: float | None = None
    causal: bool = True
    window: int | None = None
    query: str = "fp8"

    def keywords(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def gamma(n: float) -> float:
    return n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF)


def quantized_query(q: Tensor) -> Tensor:
    """q [T, H, D] after e4m3(q / s) * s with s = max|q| / 448 in float32, as float64."""
    scale = q.float().abs().amax(-1, keepdim=True) / 448.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return round_e4m3((q.float() / scale).double()) * scale.double()


def sequence_oracle(q: Tensor, k: Tensor, v: Tensor, options: Options, level: str) -> tuple[Tensor, Tensor]:
    """Output and bound, both float64 [n, H, D], of the last n positions of k and v [L, H_kv, D] (float64)."""
    n, heads, d = q.shape
    length = k.shape[0]
    q64 = quantized_query(q) if options.query == "fp8" else q.double()
    repeat = heads // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scale = d**-0.5 if options.scale is None else options.scale
    position, key = torch.arange(length - n, length)[:, None], torch.arange(length)[None, :]
    seen = (key <= position) if options.causal else torch.ones(n, length, dtype=torch.bool)
    if options.window is not None:
        seen = seen & (key > position - options.window)
    scores = torch.einsum("nhd,lhd->hnl", q64, k) * scale
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    magnitude = torch.einsum("nhd,lhd->hnl", q64.abs(), k.abs()) * abs(scale)
    largest = magnitude.masked_fill(~seen, 0.0).amax(-1).T[..., None]
    bf16 = level == "avx512_bf16"
    split = 2.0**-16 if bf16 and options.query == "float32" else 0.0
    exponent = 2 * (gamma(d + 10) + split) * largest
    exponentials = (2 + length / 32) * 2.0**-22
    rounding = 2 * gamma(length * 33 / 32 + 16) + (2.0**-8 if bf16 else 0.0)
    relative = 2 * (torch.expm1(exponent) + exponentials) + rounding
    out = torch.einsum("hnl,lhd->nhd", weights, v)
    underflow = length * 2.0**-120 * max(1.0, float(v.abs().max()))
    return out, relative * (1 + 2.0**-6) * torch.einsum("hnl,lhd->nhd", weights, v.abs()) + underflow


def oracle(q: Tensor, cache: KVCache, cu_seqlens: Tensor, options: Options, level: str) -> tuple[Tensor, Tensor]:
    """Output and bound [T, H, D] of the operator's call with the same arguments; zeros past the last offset."""
    k, v = cache.dequantize(torch.float64)
    out, bound = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape, dtype=torch.float64)
    offsets = cu_seqlens.tolist()
    for s, (first, last) in enumerate(itertools.pairwise(offsets)):
        if first == last:
            continue
        held = int(cache.lengths[s])
        keys, values = (t[s, :, :held].transpose(0, 1) for t in (k, v))
        out[first:last], bound[first:last] = sequence_oracle(q[first:last], keys, values, options, level)
    return out, bound


def filled_cache(
    lengths: list[int],
    kv_heads: int,
    head_dim: int,
    format: str = "int4",
    scale_dtype: torch.dtype = torch.bfloat16,
    room: int = 3,
) -> KVCache:
    """A cache whose sequences hold random tokens, with rows past each length that must not be read."""
    from tilewright.ops import kv_append_

    cache = KVCache.allocate(len(lengths), kv_heads, head_dim, max([*lengths, 1]) + room, format, scale_dtype)
    poison(cache)
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    kv_append_(cache, torch.randn(total, kv_heads, head_dim), torch.randn(total, kv_heads, head_dim), offsets)
    return cache


def poison(cache: KVCache) -> None:
    """Overwrite every row with the largest code and NaN."""
    for data in (cache.k, cache.v):
        data.fill_(255 if data.dtype == torch.uint8 else torch.nan)
    for scales in (cache.k_scales, cache.v_scales):
        if scales is not None:
            scales.fill_(torch.nan)


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)
