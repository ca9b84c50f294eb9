# SPDX-License-Identifier: Apache-2.0
"""Mixture of memories: several linear-attention states and a router (MoM, arXiv 2502.13685)."""

from __future__ import annotations

from tilewright.nn.mom.attention import OPS, mom_attention
from tilewright.nn.mom.layer import MomAttention
from tilewright.nn.mom.routing import load_balancing_loss, mom_route

MIXERS = {"mom": MomAttention}

__all__ = ["MIXERS", "OPS", "MomAttention", "load_balancing_loss", "mom_attention", "mom_route"]
