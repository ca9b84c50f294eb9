# SPDX-License-Identifier: Apache-2.0
"""Mixers whose decay is a constant of the head: Lightning Attention-2 (arXiv 2401.04658), RetNet (2307.08621)."""

from __future__ import annotations

from tilewright.nn.lightning_attention.layer import LightningAttention
from tilewright.nn.lightning_attention.retention import MultiScaleRetention

MIXERS = {"lightning": LightningAttention, "retnet": MultiScaleRetention}

__all__ = ["MIXERS", "LightningAttention", "MultiScaleRetention"]
