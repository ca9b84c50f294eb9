# SPDX-License-Identifier: Apache-2.0
"""TeLLMe v2: table-lookup products for ternary models on an edge FPGA (arXiv 2510.15926): costs and speed."""

from __future__ import annotations

from tilewright.edge.tellme.config import (
    OURS,
    PAPER_BUDGET,
    XCK26,
    Calibration,
    Resources,
    Shape,
    TellmeConfig,
)
from tilewright.edge.tellme.presets import BITNET_0_73B, BITNET_2B, SMOLLM2_135M
from tilewright.edge.tellme.search import Found, search

__all__ = [
    "BITNET_0_73B",
    "BITNET_2B",
    "OURS",
    "PAPER_BUDGET",
    "SMOLLM2_135M",
    "XCK26",
    "Calibration",
    "Found",
    "Resources",
    "Shape",
    "TellmeConfig",
    "search",
]
