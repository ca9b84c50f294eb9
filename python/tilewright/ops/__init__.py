# SPDX-License-Identifier: Apache-2.0
"""The operators: one file per kernel of `csrc/ops`, each with its fake, its checks and its documentation."""

from __future__ import annotations

from tilewright import _native

_native.require()

from tilewright.ops.int4_fp8_attention import int4_fp8_attention  # noqa: E402
from tilewright.ops.int4_linear import (  # noqa: E402
    int4_fp8_linear,
    int4_int8_linear,
    quantize_fp8_per_token,
    quantize_int8_per_token,
)
from tilewright.ops.kv_cache import KVCache, kv_append_  # noqa: E402

__all__ = [
    "KVCache",
    "int4_fp8_attention",
    "int4_fp8_linear",
    "int4_int8_linear",
    "kv_append_",
    "quantize_fp8_per_token",
    "quantize_int8_per_token",
]
