# SPDX-License-Identifier: Apache-2.0
"""The whole accelerator in RTL: layers from memory to memory, simulated with cocotbext-axi's memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from simulate import simulate

pytest.importorskip("cocotbext.axi", reason="cocotbext-axi is not installed")
SIZES = {
    "WeightWords": 1024, "RowBeatsMax": 64, "BlocksMax": 16, "BeatsMax": 128, "RowsMax": 4, "HeadsMax": 4,
    "KvHeadsMax": 2, "HeadBeatsMax": 2, "AttentionBeatsMax": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("g", "t", "q", "p", "lanes", "banks"), [(3, 4, 4, 4, 4, 1), (2, 5, 6, 1, 8, 2), (3, 7, 8, 2, 16, 1)]
)
def test_accelerator(g, t, q, p, lanes, banks, tmp_path):
    point = {"G": g, "T": t, "Q": q, "P": p, "Lanes": lanes, "Banks": banks}
    assert simulate("accelerator", point | SIZES, tmp_path, wrapper="accelerator_ids") == 7
