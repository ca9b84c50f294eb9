# SPDX-License-Identifier: Apache-2.0
"""Delta-rule mixers: DeltaNet (arXiv 2406.06484), Gated DeltaNet (2412.06464), Kimi Delta Attention (2510.26692)."""

from __future__ import annotations

from tilewright.nn.delta_rule.delta_net import DeltaNet
from tilewright.nn.delta_rule.gated_delta_net import GatedDeltaNet
from tilewright.nn.delta_rule.kimi_delta_attention import KimiDeltaAttention

MIXERS = {"deltanet": DeltaNet, "gated_deltanet": GatedDeltaNet, "kda": KimiDeltaAttention}

__all__ = ["MIXERS", "DeltaNet", "GatedDeltaNet", "KimiDeltaAttention"]
