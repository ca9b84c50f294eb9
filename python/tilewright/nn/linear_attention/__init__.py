# SPDX-License-Identifier: Apache-2.0
"""Additive linear attention with a fixed feature map (arXiv 2006.16236): the baseline without decay or correction."""

from __future__ import annotations

from tilewright.nn.linear_attention.layer import LinearAttention

MIXERS = {"linear_attention": LinearAttention}

__all__ = ["MIXERS", "LinearAttention"]
