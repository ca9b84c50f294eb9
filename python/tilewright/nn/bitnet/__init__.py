# SPDX-License-Identifier: Apache-2.0
"""BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764): linear layers with ternary weights and INT8 activations."""

from __future__ import annotations

from tilewright.nn.bitnet.convert import pack_bitlinears, replace_with_bitlinear
from tilewright.nn.bitnet.linear import BitLinear
from tilewright.nn.bitnet.modeling import build_bitnet

__all__ = ["BitLinear", "build_bitnet", "pack_bitlinears", "replace_with_bitlinear"]
