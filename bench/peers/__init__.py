# SPDX-License-Identifier: Apache-2.0
"""What tilewright is compared with. A peer of whole models has `available()` (the reason why it cannot run here, or
None) and `methods(gguf)` (name -> how `tilewright.measure` runs it)."""

from __future__ import annotations
