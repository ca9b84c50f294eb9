# SPDX-License-Identifier: Apache-2.0
"""Low-bit tensors: what they hold, how they are stored, and conversion to what the kernels read."""

from __future__ import annotations

from tilewright.formats.int4 import Int4Weight, PackedInt4, pack_codes, per_channel_group, quantize_int4
from tilewright.formats.int8 import Int8Weight
from tilewright.formats.ternary import PackedTernary, pack_ternary, quantize_ternary, wrap_ternary

__all__ = [
    "Int4Weight",
    "Int8Weight",
    "PackedInt4",
    "PackedTernary",
    "pack_codes",
    "pack_ternary",
    "per_channel_group",
    "quantize_int4",
    "quantize_ternary",
    "wrap_ternary",
]
