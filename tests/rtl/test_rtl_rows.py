# SPDX-License-Identifier: Apache-2.0
"""Element-wise units in RTL, simulated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from simulate import simulate


@pytest.mark.parametrize(("width", "exponent_bits"), [(39, 8), (12, 6), (62, 7)])
def test_half_pack(width, exponent_bits, tmp_path):
    assert simulate("half_pack", {"Width": width, "ExponentBits": exponent_bits}, tmp_path) == 1


@pytest.mark.parametrize("lanes", [16, 4, 1])
def test_quantize(lanes, tmp_path):
    assert simulate("quantize", {"Lanes": lanes}, tmp_path) == 8


@pytest.mark.parametrize("module", ["inverse_root", "row_factor"])
def test_once_a_row(module, tmp_path):
    assert simulate(module, {}, tmp_path) == 1


@pytest.mark.parametrize("lanes", [16, 4, 2])
def test_dequant_fuse(lanes, tmp_path):
    assert simulate("dequant_fuse", {"Lanes": lanes, "HeadBeatsMax": 2}, tmp_path) == 18


@pytest.mark.parametrize(("lanes", "beats"), [(16, 6), (4, 5), (1, 9)])
def test_rms_max(lanes, beats, tmp_path):
    assert simulate("rms_max", {"Lanes": lanes, "RowBeatsMax": beats}, tmp_path) == 9


def test_rms_max_of_the_widest_row(tmp_path):
    parameters = {"Lanes": 16, "RowBeatsMax": 1024}
    assert simulate("rms_max", parameters, tmp_path, {"COCOTB_TEST_FILTER": "the_widest_rows_fill_the_sum"}) == 1


@pytest.mark.parametrize(
    ("lanes", "g", "t", "beats"), [(16, 3, 28, 12), (4, 3, 4, 9), (1, 2, 5, 23), (16, 2, 5, 3)], ids=str
)
def test_row_entry(lanes, g, t, beats, tmp_path):
    assert simulate("row_entry", {"Lanes": lanes, "G": g, "T": t, "RowBeatsMax": beats}, tmp_path) == 12


def test_the_tables_are_the_contracts():
    from tilewright.edge.contract.export import sv

    package = Path(__file__).resolve().parents[2] / "rtl" / "src" / "contract_pkg.sv"
    assert package.read_text() == sv(), f"run python -m tilewright.edge.contract.export sv {package}"
