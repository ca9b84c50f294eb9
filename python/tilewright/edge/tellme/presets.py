# SPDX-License-Identifier: Apache-2.0
"""Models and boards with published figures."""

from __future__ import annotations

from tilewright.edge.tellme.config import Resources, Shape

BITNET_0_73B = Shape("bitnet-0.73b", 1536, 4096, 24, 16, 16, 96, 32002, 4)
BITNET_2B = Shape("bitnet-2b", 2560, 6912, 30, 20, 5, 128, 128256, 4)
SMOLLM2_135M = Shape("smollm2-135m", 576, 1536, 30, 9, 3, 64, 49152, 2)
SHAPES = {shape.name: shape for shape in (BITNET_0_73B, BITNET_2B, SMOLLM2_135M)}

BOARDS = {"kv260": Resources(117120, 1248, 144, 64)}
"""What a board's chip has. KV260: XCK26."""

PAPER = {
    "decode_tokens_per_s": 25.0,
    "ttft_64": 0.45,
    "ttft_128": 0.96,
    "prefill_tokens_per_s": 143.0,
    "uram_weight_buffer": 48,
    "vectors": 24 * 347648,
}
PEER_SMOLLM2 = {"decode_tokens_per_s": 27.0, "prefill_tokens_per_s": 73.6, "clock_mhz": 100.0}
"""Torch2RISCV-accelerator v2.3 on the same board, int8, from its release notes."""


def shape_of(name: str) -> Shape:
    """A preset.

    Raises:
        ValueError: there is none of that name.
    """
    from tilewright._methods import choose

    return choose(SHAPES, name.lower(), "model")
