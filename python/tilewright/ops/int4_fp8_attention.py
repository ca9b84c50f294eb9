# SPDX-License-Identifier: Apache-2.0
"""Attention of FP8 queries over an INT4 KV cache (FireQ, arXiv 2505.20839). Kernel: csrc/ops/int4_fp8_attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tilewright.ops.kv_cache import KVCache

_ops = torch.ops.tilewright


def int4_fp8_attention(
    q: Tensor,
    cache: KVCache,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    query: Literal["fp8", "float32"] = "fp8",
) -> Tensor:
    """`softmax(scale * q k^T + mask) v` for the last tokens of each sequence, once `kv_append_` has stored them.

    Query i of the n_s queries of sequence s sits at position lengths[s] - n_s + i. Grouped queries: head h reads KV
    head h // (H / H_kv).

    Args:
        q: `[T, H, D]`, any floating type, packed as cu_seqlens says; H a multiple of H_kv.
        cache: INT4 or bfloat16, not changed.
        cu_seqlens: int64 or int32 `[S+1]`. Rows of q past the last offset give zeros.
        scale: of the scores; D^-1/2 when None.
        causal: a query sees keys up to its own position; False: all keys of its sequence.
        window: and of those only keys after position - window; None for all.
        query: "fp8" rounds each token and head of q to e4m3(q / s), s = max|q| / 448, as hardware with FP8 products
            needs; "float32" takes q as it is.

    Returns:
        `[T, H, D]` in the dtype of q. The bits of a query's result depend on the query and its keys: not on the number
        of threads, the packing of sequences, or how many queries come at once. On a CUDA device the shapes of a call
        choose among kernels for few and for many queries a sequence, which may differ in the last bits; within one of
        them the same holds, except that a window may move the places where a long sequence is cut.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or a sequence holds fewer tokens than it has queries (on a
            CUDA device, where the host does not read lengths: its rows are NaN).
        ValueError: query is neither word.
    """
    if query not in ("fp8", "float32"):
        raise ValueError(f"int4_fp8_attention: query = {query!r}, needed 'fp8' or 'float32'")
    factor = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    return _ops.int4_fp8_attention(
        q,
        cache.k,
        cache.v,
        cache.k_scales,
        cache.v_scales,
        cache.lengths,
        cu_seqlens,
        factor,
        causal,
        window,
        query == "fp8",
    )


@torch.library.register_fake("tilewright::int4_fp8_attention")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    lengths: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    fp8_query: bool,
) -> Tensor:
    torch._check(q.dim() == 3, lambda: "q must be [T, H, D]")
    return q.new_empty(q.shape)
