# SPDX-License-Identifier: Apache-2.0
"""Attention in RTL, simulated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from simulate import simulate


@pytest.mark.parametrize(
    ("p", "lanes", "heads", "kv_heads", "head_beats"), [(4, 4, 4, 2, 2), (2, 8, 6, 3, 1), (1, 16, 2, 2, 2)]
)
def test_attention(p, lanes, heads, kv_heads, head_beats, tmp_path):
    sizes = {"HeadsMax": heads, "KvHeadsMax": kv_heads, "BeatsMax": heads * head_beats}
    assert simulate("attention", {"P": p, "Lanes": lanes, **sizes}, tmp_path) == 12
