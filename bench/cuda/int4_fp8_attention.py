# SPDX-License-Identifier: Apache-2.0
"""Attention over an INT4 cache beside torch's flash attention over bfloat16 keys and values.

Decoding is bound by the bytes of the cache, codes and scales once; a case takes its caches in turn, more of them than
the last-level cache holds. A prompt is bound by operations: the scores at the FP8 rate and the sums at bfloat16's,
stated as three quarters of the operations at bfloat16's rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.cuda.cases import GpuCase, Methods
from tilewright.ops import KVCache, int4_fp8_attention, kv_append_

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LAST_LEVEL_CACHE = 64 << 20  # more than the device has
MOST_COPIES = 48
PEER_BYTES = 24 << 30  # of bfloat16 caches: a peer that needs more is left out
TOKEN_BYTES = 2 * KV_HEADS * (HEAD_DIM // 2 + 2)  # codes and bfloat16 scales of keys and values
TOKEN_BYTES_PEER = 2 * KV_HEADS * HEAD_DIM * 2


def filled(sequences: int, length: int) -> KVCache:
    """A cache of random tokens."""
    cache = KVCache.allocate(sequences, KV_HEADS, HEAD_DIM, length, device="cuda")
    offsets = torch.tensor([0] + [0] * sequences, device="cuda")
    for s in range(sequences):
        k, v = (torch.randn(length, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        offsets[s + 1 :] = length
        kv_append_(cache, k, v, offsets)
        offsets.zero_()
    return cache


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    order = itertools.cycle(calls)
    return lambda: next(order)()


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def copies(sequences: int, length: int, token_bytes: int) -> int:
    return min(MOST_COPIES, max(2, 1 + LAST_LEVEL_CACHE // (sequences * length * token_bytes)))


def decode_methods(sequences: int, length: int) -> Methods:
    count = copies(sequences, length, TOKEN_BYTES)
    q = torch.randn(sequences, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    offsets = torch.arange(sequences + 1, device="cuda")
    caches = [filled(sequences, length) for _ in range(count)]
    methods: Methods = {
        "tilewright": in_turn([partial(int4_fp8_attention, q, cache, offsets) for cache in caches]),
    }
    peers = copies(sequences, length, TOKEN_BYTES_PEER)
    if peers * sequences * length * TOKEN_BYTES_PEER <= PEER_BYTES:
        shape = (sequences, KV_HEADS, length, HEAD_DIM)
        theirs = [
            tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)) for _ in range(peers)
        ]
        rows = q[:, :, None]
        methods["torch flash bfloat16"] = in_turn([partial(flash, rows, k, v, False) for k, v in theirs])
    return methods


def prefill_methods(length: int) -> Methods:
    q = torch.randn(length, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(length, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    offsets = torch.tensor([0, length], device="cuda")
    cache = KVCache.allocate(1, KV_HEADS, HEAD_DIM, length, device="cuda")
    kv_append_(cache, k, v, offsets)
    theirs = [t.transpose(0, 1)[None].contiguous() for t in (q, k, v)]
    return {
        "tilewright": partial(int4_fp8_attention, q, cache, offsets),
        "torch flash bfloat16": partial(flash, *theirs, True),
    }


def append_methods(tokens: int) -> Methods:
    k, v = (torch.randn(tokens, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    offsets = torch.tensor([0, tokens], device="cuda")
    cache = KVCache.allocate(1, KV_HEADS, HEAD_DIM, tokens, device="cuda")

    def ours() -> None:
        cache.lengths.zero_()
        kv_append_(cache, k, v, offsets)

    theirs = [torch.empty_like(t) for t in (k, v)]

    def copied() -> None:
        for to, source in zip(theirs, (k, v), strict=True):
            to.copy_(source)

    return {"tilewright": ours, "torch copy bfloat16": copied}


def cases() -> list[GpuCase]:
    """Decoding, prompts and appending at Llama-3-8B's heads."""
    found = []
    for length in (1024, 4096, 16384):
        operations = 2.0 * length * (length + 1) * HEADS * HEAD_DIM
        found.append(
            GpuCase(
                name=f"int4_fp8_attention_prefill_{length}",
                make=partial(prefill_methods, length),
                bytes=length * (TOKEN_BYTES + 4 * HEADS * HEAD_DIM),
                operations=0.75 * operations,
                calls=4,
                note="causal, 32 / 8 heads of 128; three quarters of the operations: scores are FP8 products",
            )
        )
    for length, sequences in itertools.product((1024, 8192, 32768), (1, 8, 64)):
        moved = sequences * length * TOKEN_BYTES + 2 * sequences * HEADS * HEAD_DIM * 2
        found.append(
            GpuCase(
                name=f"int4_fp8_attention_decode_{sequences}x{length}",
                make=partial(decode_methods, sequences, length),
                bytes=moved,
                operations=4.0 * sequences * length * HEADS * HEAD_DIM,
                calls=max(8, copies(sequences, length, TOKEN_BYTES)),
                note="32 / 8 heads of 128; bytes of the INT4 cache, torch reads 3.9 times as many",
            )
        )
    for tokens in (64, 16384):
        found.append(
            GpuCase(
                name=f"int4_kv_append_{tokens}",
                make=partial(append_methods, tokens),
                bytes=tokens * (TOKEN_BYTES + 2 * KV_HEADS * HEAD_DIM * 2),
                operations=0.0,
                note="quantizes and places keys and values of 8 heads of 128",
            )
        )
    return found
