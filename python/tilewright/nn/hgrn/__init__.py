# SPDX-License-Identifier: Apache-2.0
"""HGRN: a gated vector recurrence whose gates have lower bounds that grow with depth (arXiv 2311.04823)."""

from __future__ import annotations

from tilewright.nn.hgrn.gate import LowerBounds, log_forget_gate
from tilewright.nn.hgrn.layer import HGRN

MIXERS = {"hgrn": HGRN}

__all__ = ["HGRN", "MIXERS", "LowerBounds", "log_forget_gate"]
