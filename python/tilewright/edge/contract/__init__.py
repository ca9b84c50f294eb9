# SPDX-License-Identifier: Apache-2.0
"""The accelerator's arithmetic, bit for bit, in numpy. The document is ``docs/reference/accelerator-contract.md``."""

from __future__ import annotations

from tilewright.edge.contract.layer import KvCache, Layer, Linear, decoder_layer
from tilewright.edge.contract.rows import (
    FUSE_MODES,
    NormConstants,
    dequant_fuse,
    dequantize,
    quantize,
    residual_add,
    rms_max,
    rope,
    rope_order,
    rope_table,
    row_max,
    silu_multiply,
    squared_relu_multiply,
)
from tilewright.edge.contract.scale import Factor
from tilewright.edge.contract.softmax import MAX_CONTEXT, MAX_HEAD_SIZE, attention, score_factor
from tilewright.edge.contract.status import Status, StatusRegister
from tilewright.edge.contract.stream import beats_of, buffer_place, vectors_per_beat, weights_of
from tilewright.edge.contract.weights import Tiling, TlmmWeights, pack_tlmm, tlmm

__all__ = [
    "FUSE_MODES",
    "MAX_CONTEXT",
    "MAX_HEAD_SIZE",
    "Factor",
    "KvCache",
    "Layer",
    "Linear",
    "NormConstants",
    "Status",
    "StatusRegister",
    "Tiling",
    "TlmmWeights",
    "attention",
    "beats_of",
    "buffer_place",
    "decoder_layer",
    "dequant_fuse",
    "dequantize",
    "pack_tlmm",
    "quantize",
    "residual_add",
    "rms_max",
    "rope",
    "rope_order",
    "rope_table",
    "row_max",
    "score_factor",
    "silu_multiply",
    "squared_relu_multiply",
    "tlmm",
    "vectors_per_beat",
    "weights_of",
]
