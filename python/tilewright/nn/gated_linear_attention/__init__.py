# SPDX-License-Identifier: Apache-2.0
"""Mixers with a gate for every channel of the keys: GLA (arXiv 2312.06635) and HGRN2 (2404.07904)."""

from __future__ import annotations

from tilewright.nn.gated_linear_attention.gla import GatedLinearAttention
from tilewright.nn.gated_linear_attention.hgrn2 import HGRN2

MIXERS = {"gla": GatedLinearAttention, "hgrn2": HGRN2}

__all__ = ["HGRN2", "MIXERS", "GatedLinearAttention"]
