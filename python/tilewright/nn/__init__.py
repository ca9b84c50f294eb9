# SPDX-License-Identifier: Apache-2.0
"""Layers built from the operators."""

from __future__ import annotations

from tilewright.nn.linear import W4A8Linear

__all__ = ["W4A8Linear"]
