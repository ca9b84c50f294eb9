# SPDX-License-Identifier: Apache-2.0
"""Softmax attention as a mixer: full, and within a sliding window."""

from __future__ import annotations

from tilewright.nn.softmax_attention.layer import SlidingWindowAttention, SoftmaxAttention

MIXERS = {"softmax": SoftmaxAttention, "sliding_window": SlidingWindowAttention}

__all__ = ["MIXERS", "SlidingWindowAttention", "SoftmaxAttention"]
