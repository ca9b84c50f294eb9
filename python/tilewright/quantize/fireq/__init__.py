# SPDX-License-Identifier: Apache-2.0
"""FireQ: INT4 weights, FP8 activations and a RoPE-aware INT4 cache (arXiv 2505.20839)."""

from __future__ import annotations

from tilewright.quantize import Method
from tilewright.quantize.fireq.config import LLAMA3_8B_RECIPE, ChannelScaling, FireQConfig
from tilewright.quantize.fireq.method import quantize_model

METHOD = Method("fireq", "INT4 weights with channel scaling, RoPE-aware INT4 KV cache", FireQConfig, quantize_model)

__all__ = ["LLAMA3_8B_RECIPE", "METHOD", "ChannelScaling", "FireQConfig", "quantize_model"]
