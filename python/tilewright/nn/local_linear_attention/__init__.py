# SPDX-License-Identifier: Apache-2.0
"""Local linear attention as a mixer (Zuo et al., arXiv 2510.01450)."""

from __future__ import annotations

from tilewright.nn.local_linear_attention.layer import LocalLinearAttention

MIXERS = {"local_linear_attention": LocalLinearAttention}

__all__ = ["MIXERS", "LocalLinearAttention"]
