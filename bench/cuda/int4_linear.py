# SPDX-License-Identifier: Apache-2.0
"""int4_fp8_linear at the shapes of Llama-2-7B and Llama-3-8B, beside torch's bfloat16 and FP8 products and gemlite.

Two forms of the same operator: "tilewright" rounds the tokens and multiplies, as a layer does; "tilewright rounded"
starts from tokens that are rounded already, as torch's FP8 product does. Weights rotate, so that a case of few tokens
reads them from memory.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch

from bench.cuda.cases import GpuCase, Methods
from tilewright import ops
from tilewright.formats import PackedInt4, quantize_int4

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (11008, 4096), (4096, 11008)]
TOKENS = [1, 8, 16, 64, 256, 1024, 4096]
GROUP = 128
CACHE = 50 << 20
COPIES_BYTES = 3 * CACHE


def _copies(bytes_each: int) -> int:
    """Enough that the last-level cache has forgotten one before its next use; few, where one alone exceeds it."""
    return max(2, min(24, -(-COPIES_BYTES // bytes_each)))


def _in_turn(work: Callable[[Any], Any], inputs: list[Any]) -> Callable[[], Any]:
    turn = itertools.cycle(inputs)
    return lambda: work(next(turn))


def _packed_bytes(n: int, k: int) -> int:
    return n * k // 2 + 2 * n * (k // GROUP)


@functools.lru_cache(maxsize=1)
def _weights(n: int, k: int) -> tuple[torch.Tensor, PackedInt4]:
    """A dense weight and its packed form, made once for all numbers of tokens."""
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
    return dense, quantize_int4(dense, GROUP).pack()


def _make(m: int, n: int, k: int) -> Callable[[], Methods]:
    def make() -> Methods:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        dense, packed = _weights(n, k)
        weights = [
            PackedInt4(packed.data.clone(), packed.shape, packed.layout) for _ in range(_copies(_packed_bytes(n, k)))
        ]
        tokens = ops.fp8_tokens(x, packed)
        methods: Methods = {
            "tilewright": _in_turn(lambda w: ops.int4_fp8_linear(x, w), weights),
            "tilewright rounded": _in_turn(lambda w: ops.int4_fp8_linear(tokens, w), weights),
        }
        wide = [dense.clone() for _ in range(_copies(2 * n * k))]
        methods["torch bf16"] = _in_turn(lambda w: torch.nn.functional.linear(x, w), wide)
        methods |= _fp8_peer(x, dense)
        methods |= _gemlite_peer(x, dense)
        return methods

    return make


def _fp8_peer(x: torch.Tensor, dense: torch.Tensor) -> Methods:
    """torch._scaled_mm with one scale a token and one a row of the weight, tokens rounded beforehand."""
    codes, scale = ops.quantize_fp8_per_token(x)
    rows, row_scale = ops.quantize_fp8_per_token(dense)
    copies = [rows.clone().t() for _ in range(_copies(dense.numel()))]
    by_token, by_row = scale[:, None].contiguous(), row_scale[None, :].contiguous()

    def work(w: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(
            codes, w, scale_a=by_token, scale_b=by_row, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return {"torch fp8": _in_turn(work, copies)}


def _gemlite_peer(x: torch.Tensor, dense: torch.Tensor) -> Methods:
    """gemlite's A16W4 kernel, where the wheel is installed."""
    try:
        gemlite = importlib.import_module("gemlite.core")
    except ImportError:
        return {}
    n, k = dense.shape
    groups = dense.view(n, k // GROUP, GROUP).float()
    scales = groups.abs().amax(-1, keepdim=True) / 7
    codes = ((groups / scales).round().clamp(-7, 7) + 8).to(torch.uint8).view(n, k)
    layer = gemlite.GemLiteLinear(4, GROUP, k, n, input_dtype=gemlite.DType.BF16, output_dtype=gemlite.DType.BF16)
    layer.pack(codes, scales.view(n, -1).bfloat16(), torch.full_like(scales.view(n, -1), 8).bfloat16(), None)
    return {"gemlite": lambda: layer(x)}


def cases() -> list[GpuCase]:
    found = []
    for (n, k), m in itertools.product(SHAPES, TOKENS):
        found.append(
            GpuCase(
                name=f"int4_fp8_linear M={m} N={n} K={k}",
                make=_make(m, n, k),
                bytes=_packed_bytes(n, k) + 2 * m * (k + n),
                operations=2.0 * m * n * k,
                peak="fp8",
                calls=24 if m <= 256 else 4,
                note="tokens rounded inside; 'rounded' and 'torch fp8' start from rounded tokens",
            )
        )
    return found
