# SPDX-License-Identifier: Apache-2.0
"""The accelerator for ternary models on an edge FPGA: its integer contract, its HLS units, its cycle model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.edge.hls import HlsUnits
    from tilewright.edge.model import EdgeModel, Session

__all__ = ["EdgeModel", "HlsUnits", "Session"]


def __getattr__(name: str) -> Any:
    if name in ("EdgeModel", "Session"):
        from tilewright.edge import model

        return getattr(model, name)
    if name == "HlsUnits":
        from tilewright.edge.hls import HlsUnits

        return HlsUnits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
