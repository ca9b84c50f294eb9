# SPDX-License-Identifier: Apache-2.0
"""TeLLMe v2: table-lookup products for ternary models on an edge FPGA (arXiv 2510.15926): costs and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from tilewright.edge.tellme.search import Found

_HOMES = {
    "config": ("OURS", "PAPER_BUDGET", "XCK26", "Calibration", "Resources", "Shape", "TellmeConfig"),
    "presets": ("BITNET_0_73B", "BITNET_2B", "SMOLLM2_135M"),
    "search": ("Found",),
}

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
]


def __getattr__(name: str) -> Any:
    """Public names on first use: the command line imports this package to find its verbs."""
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
