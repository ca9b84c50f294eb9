# SPDX-License-Identifier: Apache-2.0
"""Descriptors taken apart, completed and checked in RTL."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from simulate import simulate

LARGE = {
    "G": 3, "T": 28, "Q": 16, "Lanes": 16, "WeightWords": 12288, "RowBeatsMax": 256, "BlocksMax": 49, "BeatsMax": 256,
    "RowsMax": 16, "HeadsMax": 32, "KvHeadsMax": 16, "HeadBeatsMax": 16, "AttentionBeatsMax": 128,
}  # fmt: skip
SMALL = {
    "G": 2, "T": 5, "Q": 6, "Lanes": 4, "WeightWords": 96, "RowBeatsMax": 9, "BlocksMax": 7, "BeatsMax": 5,
    "RowsMax": 3, "HeadsMax": 5, "KvHeadsMax": 3, "HeadBeatsMax": 2, "AttentionBeatsMax": 8,
}  # fmt: skip


@pytest.mark.parametrize("point", [LARGE, SMALL], ids=["large", "small"])
def test_descriptor_unit(point, tmp_path):
    assert simulate("descriptor_unit", point, tmp_path) == 6
