# SPDX-License-Identifier: Apache-2.0
"""The operators: one file per kernel of `csrc/ops`, each with its fake, its checks and its documentation."""

from __future__ import annotations

from tilewright import _native

_native.require()

from tilewright.ops.delta_rule import (  # noqa: E402
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
    gated_delta_rule_decode,
)
from tilewright.ops.gated_linear_attention import (  # noqa: E402
    chunk_gla,
    chunk_linear_attn,
    chunk_retention,
    chunk_simple_gla,
    fused_recurrent_gla,
    fused_recurrent_linear_attn,
    fused_recurrent_retention,
    fused_recurrent_simple_gla,
)
from tilewright.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn  # noqa: E402
from tilewright.ops.int4_fp8_attention import int4_fp8_attention  # noqa: E402
from tilewright.ops.int4_linear import (  # noqa: E402
    Fp8Tokens,
    fp8_tokens,
    int4_fp8_linear,
    int4_int8_linear,
    quantize_fp8_per_token,
    quantize_int8_per_token,
)
from tilewright.ops.kv_cache import KVCache, kv_append_  # noqa: E402
from tilewright.ops.lightning_attention import (  # noqa: E402
    build_slope_tensor,
    chunk_lightning_attn,
    fused_recurrent_lightning_attn,
    lightning_attn_decode,
    lightning_attn_func,
)
from tilewright.ops.linear_attention import linear_attention, linear_attention_step_, state_transition  # noqa: E402
from tilewright.ops.local_linear_attention import lla_attention, lla_decode, parallax, relmm  # noqa: E402
from tilewright.ops.sparse_gated_mlp import cats_activation, sparse_gated_mlp  # noqa: E402
from tilewright.ops.ternary_linear import (  # noqa: E402
    pack_ternary,
    quantize_ternary_activation,
    ternary_linear,
    ternary_matmul,
)

__all__ = [
    "Fp8Tokens",
    "KVCache",
    "build_slope_tensor",
    "cats_activation",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_hgrn",
    "chunk_kda",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_simple_gla",
    "fp8_tokens",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gla",
    "fused_recurrent_hgrn",
    "fused_recurrent_kda",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "gated_delta_rule_decode",
    "int4_fp8_attention",
    "int4_fp8_linear",
    "int4_int8_linear",
    "kv_append_",
    "lightning_attn_decode",
    "lightning_attn_func",
    "linear_attention",
    "linear_attention_step_",
    "lla_attention",
    "lla_decode",
    "pack_ternary",
    "parallax",
    "quantize_fp8_per_token",
    "quantize_int8_per_token",
    "quantize_ternary_activation",
    "relmm",
    "sparse_gated_mlp",
    "state_transition",
    "ternary_linear",
    "ternary_matmul",
]
