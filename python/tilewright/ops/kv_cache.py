# SPDX-License-Identifier: Apache-2.0
"""A KV cache in INT4 or bfloat16, allocated once. Kernel: csrc/ops/int4_fp8_attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_ops = torch.ops.tilewright

KV_GROUP = 128
MAX_HEAD_DIM = 256
CacheFormat = Literal["int4", "bf16"]


@dataclass
class KVCache:
    """Keys and values of S sequences, room for L tokens each, and how many tokens each holds.

    INT4 (FireQ, arXiv 2505.20839): one symmetric scale for each token, head and group of 128 elements of the head.

    Attributes:
        k, v: uint8 `[S, H_kv, L, ceil(D/2)]` codes, low nibble = even element, stored as q + 8 with q in [-7, 7]; or
            bfloat16 `[S, H_kv, L, D]`.
        k_scales, v_scales: float32 or bfloat16 `[S, H_kv, L, ceil(D/128)]`; None for bfloat16.
        lengths: int64 `[S]`, tokens held. Rows past a length are never read. On a CUDA device -1 marks a sequence that
            would have outgrown the cache; `reset()` clears it.
        head_dim: D.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None
    lengths: Tensor
    head_dim: int

    @classmethod
    def allocate(
        cls,
        sequences: int,
        kv_heads: int,
        head_dim: int,
        max_length: int,
        format: CacheFormat = "int4",
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """An empty cache.

        Args:
            sequences: S, at least 1.
            kv_heads: H_kv, at least 1.
            head_dim: D, 1 to 256.
            max_length: L, tokens that each sequence can hold, at least 1.
            format: "int4" or "bf16".
            scale_dtype: of INT4 scales, bfloat16 or float32.
            device: where it lies; the CPU when None.

        Raises:
            ValueError: a size or dtype is out of range.
        """
        for name, value in (("sequences", sequences), ("kv_heads", kv_heads), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"KVCache.allocate: {name} = {value}, needed at least 1")
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"KVCache.allocate: head_dim = {head_dim}, needed 1 to {MAX_HEAD_DIM}")
        lengths = torch.zeros(sequences, dtype=torch.int64, device=device)
        rows = (sequences, kv_heads, max_length)
        if format == "bf16":
            k, v = (torch.zeros(*rows, head_dim, dtype=torch.bfloat16, device=device) for _ in range(2))
            return cls(k, v, None, None, lengths, head_dim)
        if format != "int4":
            raise ValueError(f"KVCache.allocate: format = {format!r}, needed 'int4' or 'bf16'")
        if scale_dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"KVCache.allocate: scale_dtype = {scale_dtype}, needed torch.bfloat16 or torch.float32")
        k, v = (torch.zeros(*rows, (head_dim + 1) // 2, dtype=torch.uint8, device=device) for _ in range(2))
        groups = (head_dim + KV_GROUP - 1) // KV_GROUP
        k_scales, v_scales = (torch.zeros(*rows, groups, dtype=scale_dtype, device=device) for _ in range(2))
        return cls(k, v, k_scales, v_scales, lengths, head_dim)

    @property
    def format(self) -> CacheFormat:
        return "int4" if self.k.dtype == torch.uint8 else "bf16"

    @property
    def k_codes(self) -> Tensor:
        """`k` of an INT4 cache."""
        return self._codes(self.k)

    @property
    def v_codes(self) -> Tensor:
        """`v` of an INT4 cache."""
        return self._codes(self.v)

    def _codes(self, data: Tensor) -> Tensor:
        if self.format != "int4":
            raise ValueError("KVCache: a bf16 cache holds values, not codes; use k and v")
        return data

    @property
    def sequences(self) -> int:
        return self.k.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def max_length(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, scales and lengths included."""
        tensors = (self.k, self.v, self.k_scales, self.v_scales, self.lengths)
        return sum(t.nbytes for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> KVCache:
        """The same cache on another device."""
        k, v, lengths = (tensor.to(device) for tensor in (self.k, self.v, self.lengths))
        k_scales, v_scales = (None if t is None else t.to(device) for t in (self.k_scales, self.v_scales))
        return KVCache(k, v, k_scales, v_scales, lengths, self.head_dim)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.lengths.zero_()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values `[S, H_kv, L, D]`. What lies past a sequence's length is not meaningful."""
        return self._dequantize(self.k, self.k_scales, dtype), self._dequantize(self.v, self.v_scales, dtype)

    def _dequantize(self, data: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        if scales is None:
            return data.to(dtype)
        codes = torch.stack((data & 15, data >> 4), -1).flatten(-2)[..., : self.head_dim].to(dtype) - 8
        return codes * scales.to(dtype).repeat_interleave(KV_GROUP, -1)[..., : self.head_dim]


def kv_append_(cache: KVCache, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    """Write new tokens behind those that each sequence holds, and advance `cache.lengths`.

    An INT4 cache quantizes each token and head: scale = max(max|x|, 1e-5) / 7 rounded to the scale's dtype first, codes
    rounded half-even against the rounded scale and clamped to [-7, 7]. A token and head that is not finite gets a NaN
    scale, so that exactly the queries that see it become NaN.

    Args:
        cache: changed in place.
        k, v: `[T, H_kv, D]`, any floating type, all sequences packed one behind the other.
        cu_seqlens: int64 or int32 `[S+1]`, from 0; sequence s owns rows cu_seqlens[s] to cu_seqlens[s+1]. Rows past the
            last offset are ignored.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or a sequence would outgrow max_length; nothing is written
            then. On a CUDA device lengths are not read by the host: nothing of a sequence that would outgrow the cache
            is written, its length becomes -1, and attention over it gives NaN.
    """
    _ops.int4_kv_append(k, v, cu_seqlens, cache.k, cache.v, cache.k_scales, cache.v_scales, cache.lengths)


@torch.library.register_fake("tilewright::int4_kv_append")
def _(
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    lengths: Tensor,
) -> None:
    torch._check(k.dim() == 3 and k.shape == v.shape, lambda: "k and v must be [T, H_kv, D]")
