# SPDX-License-Identifier: Apache-2.0
"""The table-lookup matrix product in RTL, simulated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from simulate import simulate

PARAMETERS = [
    {"G": 3, "T": 28, "Q": 4, "Banks": 1},
    {"G": 2, "T": 5, "Q": 3, "Banks": 2},
    {"G": 1, "T": 1, "Q": 1, "Banks": 2},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: "-".join(f"{k}{v}" for k, v in p.items()))
def test_tlmm_core(parameters, tmp_path):
    # Of the paper's tables most of the time goes into building, so one kind of back-pressure stands for all.
    patterns = ["bursts"] if parameters["T"] == 28 else ["always", "often", "half", "seldom", "bursts"]
    environment = {"TILEWRIGHT_RTL_PATTERNS": " ".join(patterns)}
    assert simulate("tlmm_core", parameters, tmp_path, environment) == 4 + len(patterns)


@pytest.mark.parametrize(("lanes_in", "lanes_out"), [(16, 84), (84, 16), (1, 3), (5, 1), (7, 7)])
def test_gearbox(lanes_in, lanes_out, tmp_path):
    assert simulate("gearbox", {"In": lanes_in, "Out": lanes_out, "Width": 8}, tmp_path) == 7


@pytest.mark.parametrize(
    "parameters",
    [
        {"Q": 16, "Vectors": 5, "Words": 32, "VectorBits": 140},
        {"Q": 6, "Vectors": 2, "Words": 10, "VectorBits": 7},
        {"Q": 2, "Vectors": 1, "Words": 8, "VectorBits": 3},
    ],
    ids=lambda p: "-".join(f"{k}{v}" for k, v in p.items()),
)
def test_weight_buffer(parameters, tmp_path):
    assert simulate("weight_buffer", parameters, tmp_path) == 7
