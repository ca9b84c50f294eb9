# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache in float64, and how far the GPU's kernels may be from it.

The bound has the form of tests/ops/attention_oracle.py; what differs is the arithmetic of each kernel. For one query
and one element of its output, with w the exact weights, v the values, A the largest |scale| sum |q_d k_d| of its keys:

    |error| <= (2 (e^E - 1 + exponentials) + weights + 2 gamma(sums)) (1 + 2^-6) sum_j w_j |v_jd|

- plain: everything in float32. E = 2 gamma(D + 10) A; exponentials 2^-22 once, and once for each tile of 32 keys that
  raises the maximum; sums of n terms with a correction a tile.
- decode: matrix units multiply bfloat16 exactly and cut their sums to 24 bits instead of rounding them, hence twice
  the gamma; a float query is the sum of two bfloat16, 2^-16 more. Weights are bfloat16: 2^-8, generous for rounding to
  nearest. A maximum may be raised by each of n/16 steps, 4 warps and 32 chunks.
- prefill: as decode, and scores are sums of e4m3 products. Hopper aligns the 32 products of a step, and the sum so
  far, to the largest of them and keeps 13 bits behind it (DeepSeek-V3, arXiv 2412.19437, on FP8 accumulation): of each
  of 33 terms less than 2^-13 M is lost, M the largest product or partial sum. In the emulator sums are exact.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from tilewright.ops import KVCache, kv_append_
from tilewright.reference.low_bit import round_e4m3
from tilewright.testing import UNIT_ROUNDOFF

LOST = 2.0**-13


@dataclasses.dataclass(frozen=True)
class Options:
    scale: float | None = None
    causal: bool = True
    window: int | None = None
    query: str = "fp8"

    def keywords(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Of one kernel; short_sums: as Hopper adds e4m3 products."""

    path: str
    short_sums: bool = False

    @property
    def matrix_unit(self) -> bool:
        return self.path != "plain"


def gamma(n: float) -> float:
    return n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF)


def quantized_query(q: Tensor) -> Tensor:
    """q [T, H, D] after e4m3(q / s) * s with s = max|q| / 448 in float32, as float64.

    On the CPU: on CUDA torch divides by a number by multiplying with its reciprocal, and another last bit of s rounds
    some quotients to another e4m3 value.
    """
    q, device = q.float().cpu(), q.device
    scale = q.abs().amax(-1, keepdim=True) / 448.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (round_e4m3((q / scale).double()) * scale.double()).to(device)


def lost_in_scores(q: Tensor, k: Tensor) -> Tensor:
    """How far a sum of e4m3 products may be from the exact one, [H, n, L]: 33 terms a step of 32 elements."""
    total = torch.zeros(q.shape[1], q.shape[0], k.shape[0], dtype=torch.float64, device=q.device)
    largest, steps = torch.zeros_like(total), 0
    for first in range(0, q.shape[-1], 32):
        a, b = q[..., first : first + 32], k[..., first : first + 32]
        total += torch.einsum("nhd,lhd->hnl", a, b)
        products = torch.einsum("nh,lh->hnl", a.abs().amax(-1), b.abs().amax(-1))
        largest = torch.maximum(largest, torch.maximum(total.abs(), products))
        steps += 1
    return steps * 33 * LOST * largest


def sequence_oracle(q: Tensor, k: Tensor, v: Tensor, options: Options, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Output and bound, both float64 [n, H, D], of the last n positions of k and v [L, H_kv, D] (float64)."""
    n, heads, d = q.shape
    length = k.shape[0]
    q64 = quantized_query(q) if options.query == "fp8" else q.double()
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    scale = d**-0.5 if options.scale is None else options.scale
    position = torch.arange(length - n, length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)[None, :]
    seen = (key <= position) if options.causal else torch.ones_like(key <= position)
    if options.window is not None:
        seen = seen & (key > position - options.window)
    scores = torch.einsum("nhd,lhd->hnl", q64, k) * scale
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    magnitude = torch.einsum("nhd,lhd->hnl", q64.abs(), k.abs()) * abs(scale)
    units = 2 if arithmetic.matrix_unit else 1
    exponent = gamma(units * (d + 10)) * magnitude
    if arithmetic.matrix_unit and options.query == "float32":
        exponent += 2.0**-16 * magnitude
    if arithmetic.short_sums:
        exponent += lost_in_scores(q64, k) * abs(scale)
    exponent = 2 * exponent.masked_fill(~seen, 0.0).amax(-1).T[..., None]
    exponentials = (36 + length / 16) * 2.0**-22
    rounding = 2 * gamma(units * (length * 17 / 16 + 40)) + (2.0**-8 if arithmetic.matrix_unit else 0.0)
    relative = 2 * (torch.expm1(exponent) + exponentials) + rounding
    out = torch.einsum("hnl,lhd->nhd", weights, v)
    underflow = length * 2.0**-110 * max(1.0, float(v.abs().max()))
    return out, relative * (1 + 2.0**-6) * torch.einsum("hnl,lhd->nhd", weights, v.abs()) + underflow


def oracle(
    q: Tensor, cache: KVCache, counts: list[int], options: Options, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """Output and bound [T, H, D] of the operator's call with the same arguments; zeros past the last offset."""
    k, v = cache.dequantize(torch.float64)
    out, bound = (torch.zeros(q.shape, dtype=torch.float64, device=q.device) for _ in range(2))
    held = cache.lengths.tolist()
    for s, (first, last) in enumerate(itertools.pairwise(itertools.accumulate(counts, initial=0))):
        if first < last:
            keys, values = (t[s, :, : held[s]].transpose(0, 1) for t in (k, v))
            out[first:last], bound[first:last] = sequence_oracle(q[first:last], keys, values, options, arithmetic)
    return out, bound


def defined(x: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers and stored scales of x [..., D]: every step is one float32 operation, as the definition states it."""
    codes, scales = [], []
    for group in x.float().split(128, -1):
        s = (group.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 7).to(scale_dtype)
        codes.append((group / s.float()).round().clamp(-7, 7))
        scales.append(s)
    return torch.cat(codes, -1), torch.cat(scales, -1)


def poison(cache: KVCache) -> None:
    """Overwrite every row with the largest code and NaN."""
    for data in (cache.k, cache.v):
        data.fill_(255 if data.dtype == torch.uint8 else torch.nan)
    for scales in (cache.k_scales, cache.v_scales):
        if scales is not None:
            scales.fill_(torch.nan)


def offsets(counts: list[int], device: str) -> Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0)


def filled_cache(
    lengths: list[int],
    kv_heads: int,
    head_dim: int,
    device: str,
    format: str = "int4",
    scale_dtype: torch.dtype = torch.bfloat16,
    room: int = 3,
) -> KVCache:
    """A cache whose sequences hold random tokens, with rows past each length that must not be read."""
    cache = KVCache.allocate(
        len(lengths), kv_heads, head_dim, max([*lengths, 1]) + room, format, scale_dtype, device=device
    )
    poison(cache)
    k, v = (torch.randn(sum(lengths), kv_heads, head_dim).to(device) for _ in range(2))
    kv_append_(cache, k, v, offsets(lengths, device))
    return cache
