# SPDX-License-Identifier: Apache-2.0
"""Oracles for low-bit weights, activations and caches, in plain torch.

Everything here is written for clarity, keeps the input's floating dtype (float64 included) and
shares no code with the kernels. Notation of FireQ (arXiv 2505.20839): ``W`` [N, K] weights, ``g``
group size along the last dimension, ``s`` group scales, ``q`` integer codes, ``p`` per-tensor scale.

Rounding is to nearest, ties to even, everywhere. Integer grids are symmetric: ``bits`` = 4 means
codes in [-7, 7] unless ``lowest`` says otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4M3_MAX = 448.0
E4M3_SMALLEST = 2.0**-9
_E4M3_LEAST_EXPONENT = -6
_E4M3_MANTISSA_BITS = 3


def round_e4m3(x: Tensor) -> Tensor:
    """Nearest e4m3 ("fn") value of every element, saturating at +-448; NaN and Inf become NaN.

    Works on exponents and never through a float8 cast, so that float64 inputs are rounded once.
    """
    _, exponent = torch.frexp(x)
    exponent = (exponent - 1).clamp(min=_E4M3_LEAST_EXPONENT)
    step = torch.ldexp(torch.ones_like(x), exponent - _E4M3_MANTISSA_BITS)
    rounded = (torch.round(x / step) * step).clamp(-E4M3_MAX, E4M3_MAX)
    return torch.where(torch.isfinite(x), rounded, torch.full_like(x, math.nan))


def split_groups(x: Tensor, group_size: int) -> Tensor:
    """[..., K] -> [..., ceil(K / g), g]; the last group is padded with zeros."""
    k = x.shape[-1]
    padding = -k % group_size
    padded = torch.nn.functional.pad(x, (0, padding))
    return padded.reshape(*x.shape[:-1], (k + padding) // group_size, group_size)


def join_groups(groups: Tensor, k: int) -> Tensor:
    """Inverse of :func:`split_groups`: [..., G, g] -> [..., K]."""
    return groups.flatten(-2)[..., :k]


def quantize_symmetric(
    x: Tensor,
    group_size: int,
    bits: int = 4,
    *,
    scale_dtype: torch.dtype | None = None,
    least_absmax: float = 0.0,
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Group-wise symmetric codes ``q`` [..., K] and scales ``s`` [..., G] with x ~ q * s.

    ``s = max(clip * max|x|, least_absmax) / (2^(bits-1) - 1)`` is first rounded to ``scale_dtype`` (e4m3
    scales are never below 2^-9), then the integers are rounded against that rounded scale
    (FireQ section 1). An all-zero group has scale 1 (or the floor) and codes 0.
    """
    top = 2 ** (bits - 1) - 1
    groups = split_groups(x, group_size)
    s = (groups.abs().amax(-1) * clip).clamp(min=least_absmax) / top
    s = torch.where(s == 0, torch.ones_like(s), s)
    s = _round_scale(s, scale_dtype)
    q = torch.round(groups / s[..., None]).clamp(-top, top)
    return join_groups(q, x.shape[-1]), s


def _round_scale(s: Tensor, scale_dtype: torch.dtype | None) -> Tensor:
    if scale_dtype is None:
        return s
    if scale_dtype == torch.float8_e4m3fn:
        return round_e4m3(s).clamp(min=E4M3_SMALLEST)
    return s.to(scale_dtype).to(s.dtype)


def dequantize_symmetric(q: Tensor, s: Tensor, group_size: int) -> Tensor:
    """``q`` [..., K] times the scale of its group, ``s`` [..., G] -> [..., K]."""
    return q * s.repeat_interleave(group_size, -1)[..., : q.shape[-1]]


def fake_quantize(
    x: Tensor,
    group_size: int,
    bits: int = 4,
    *,
    scale_dtype: torch.dtype | None = None,
    clip: float = 1.0,
) -> Tensor:
    """x -> q * s on the symmetric grid of :func:`quantize_symmetric`; same shape and dtype."""
    q, s = quantize_symmetric(x, group_size, bits, scale_dtype=scale_dtype, clip=clip)
    return dequantize_symmetric(q, s, group_size)


def fold_weight(q: Tensor, s: Tensor, group_size: int) -> Tensor:
    """The weight a "fold" mode kernel multiplies with: e4m3(q * s), FireQ section 4 of the format."""
    return round_e4m3(dequantize_symmetric(q, s, group_size))


def default_per_tensor_scale(max_scale: float) -> float:
    """p = 2^floor(log2(56 / max_scale)): 8 p s <= 448 for every group, most scales normal e4m3."""
    if not (math.isfinite(max_scale) and max_scale > 0.0):
        return 1.0
    return 2.0 ** math.floor(math.log2(E4M3_MAX / 8 / max_scale))


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token e4m3: values ``x8`` [..., K] (in x's dtype) and scales [..., 1], x ~ x8 * scale.

    scale = max|x| / 448 over the last dimension; an all-zero token has scale 1.
    """
    scale = x.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return round_e4m3(x / scale), scale


def fake_fp8(x: Tensor) -> Tensor:
    """x -> its per-token e4m3 value; same shape and dtype."""
    x8, scale = quantize_fp8(x)
    return x8 * scale


def fake_int8(x: Tensor, group_size: int | None = None) -> Tensor:
    """x -> its symmetric INT8 value, absmax / 127 per token or per group of the last dimension."""
    return fake_quantize(x, group_size or x.shape[-1], bits=8)


def linear_oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activations: str = "none",
    per_tensor_scale: float = 1.0,
) -> Tensor:
    """y = a(x) W^T / p + bias in float64; x [..., K], weight [N, K] as the kernel represents it.

    ``activations`` is "none", "fp8" or "int8" (per token). ``weight`` is dequantized (exact mode) or
    the result of :func:`fold_weight` (fold mode).
    """
    quantizers = {"none": lambda v: v, "fp8": fake_fp8, "int8": fake_int8}
    if activations not in quantizers:
        raise ValueError(f"activations={activations!r}: need one of {sorted(quantizers)}")
    y = quantizers[activations](x.double()) @ weight.double().T / per_tensor_scale
    return y if bias is None else y + bias.double()


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    kv_bits: int | None = 4,
    kv_group: int | None = None,
    query: str = "fp8",
) -> Tensor:
    """Grouped-query attention of one sequence in float64, over quantized keys and values.

    q [n, H, D] are the last n of the L positions of k, v [L, H_kv, D]; head h reads KV head
    h // (H / H_kv). Query i sits at position L - n + i and sees positions j <= i (causal) with
    i - j < window. ``kv_bits=None`` leaves K and V alone; ``query`` is "fp8" (per token and head)
    or "none". Returns [n, H, D]; a query that sees nothing returns zeros.
    """
    n, heads, d = q.shape
    length, kv_heads, _ = k.shape
    q, k, v = q.double(), k.double(), v.double()
    if query == "fp8":
        q = fake_fp8(q)
    if kv_bits is not None:
        group = kv_group or min(d, 128)
        k, v = (fake_quantize(t, group, kv_bits) for t in (k, v))
    repeat = heads // kv_heads
    k, v = (t.repeat_interleave(repeat, 1) for t in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q, k) * (d**-0.5 if scale is None else scale)
    position = torch.arange(length - n, length)[:, None]
    key = torch.arange(length)[None, :]
    seen = torch.ones(n, length, dtype=torch.bool)
    if causal:
        seen &= key <= position
    if window is not None:
        seen &= position - key < window
    scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return torch.einsum("hnl,lhd->nhd", weights, v)
