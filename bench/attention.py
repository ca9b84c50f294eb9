# SPDX-License-Identifier: Apache-2.0
"""Attention over an INT4 cache beside torch's attention over a bfloat16 one."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.records import digest
from bench.timing import summary, time_in_turn
from tilewright.ops import KVCache, int4_fp8_attention, kv_append_


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """[T, H, D] as torch's attention wants it: [1, H, T, D]."""
    return x.transpose(0, 1)[None].contiguous()


def run_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:
    """Records of one `[[attention]]` case. Layers are taken in turn, each with a cache of its own, as in a model."""
    del threads
    queries, tokens, dim = case["queries"], case["tokens"], case["head_dim"]
    heads, kv_heads, layers = case["heads"], case["kv_heads"], case["layers"]
    torch.manual_seed(0)
    q = torch.randn(queries, heads, dim)
    keys, values = torch.randn(layers, tokens, kv_heads, dim), torch.randn(layers, tokens, kv_heads, dim)
    caches = []
    for k, v in zip(keys, values, strict=True):
        caches.append(KVCache.allocate(1, kv_heads, dim, tokens))
        kv_append_(caches[-1], k, v, torch.tensor([0, tokens]))
    offsets = torch.tensor([0, queries])
    theirs = [(heads_first(k).bfloat16(), heads_first(v).bfloat16()) for k, v in zip(keys, values, strict=True)]
    q_theirs = heads_first(q).bfloat16()

    def torch_attention(i: int) -> torch.Tensor:
        k, v = theirs[i % layers]
        return scaled_dot_product_attention(q_theirs, k, v, is_causal=queries == tokens, enable_gqa=True)

    works = {
        "int4_fp8_attention": lambda i: int4_fp8_attention(q, caches[i % layers], offsets),
        "torch bfloat16": torch_attention,
    }
    wide = (heads_first(t).double() for t in (q, keys[0], values[0]))
    exact = scaled_dot_product_attention(*wide, is_causal=queries == tokens, enable_gqa=True)[0].transpose(0, 1)
    found = {
        "int4_fp8_attention": works["int4_fp8_attention"](0),
        "torch bfloat16": works["torch bfloat16"](0)[0].transpose(0, 1),
    }
    samples = time_in_turn(works, seconds)
    medians = {name: summary(times)["median_ns"] for name, times in samples.items()}
    pairs = queries * tokens - (queries * (queries - 1) // 2 if queries == tokens else 0)
    sizes = {"int4_fp8_attention": caches[0].nbytes, "torch bfloat16": sum(t.nbytes for t in theirs[0])}
    return [
        {
            "op": name,
            "problem": {key: case[key] for key in ("queries", "tokens", "heads", "kv_heads", "head_dim")},
            "dtype": "fp8 x int4" if name == "int4_fp8_attention" else "bfloat16",
            "kernel": name,
            **summary(times),
            "operations": 4 * pairs * heads * dim,
            "bytes": sizes[name],
            "digest": digest(found[name]),
            "relative_error": float((found[name].double() - exact).norm() / exact.norm()),
            "ratios": {other: medians[other] / medians[name] for other in samples if other != name},
        }
        for name, times in samples.items()
    ]
