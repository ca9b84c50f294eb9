# SPDX-License-Identifier: Apache-2.0
"""The accelerator's memory side in RTL, simulated against cocotbext-axi's memory and master."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from simulate import simulate

pytest.importorskip("cocotbext.axi", reason="cocotbext-axi is not installed")


@pytest.mark.parametrize("bits", [64, 128, 256])
def test_axi_reader(bits, tmp_path):
    assert simulate("axi_reader", {"DataBits": bits}, tmp_path, wrapper="axi_reader_ids") == 10


@pytest.mark.parametrize("bits", [64, 128, 256])
def test_axi_writer(bits, tmp_path):
    assert simulate("axi_writer", {"DataBits": bits}, tmp_path, wrapper="axi_writer_ids") == 14


@pytest.mark.parametrize("bits", [64, 128, 256])
def test_weight_reader(bits, tmp_path):
    assert simulate("weight_reader", {"DataBits": bits}, tmp_path, wrapper="weight_reader_ids") == 10


@pytest.mark.parametrize(("g", "t", "q"), [(3, 28, 16), (3, 4, 4), (2, 5, 6)])
def test_weight_unpack(g, t, q, tmp_path):
    assert simulate("weight_unpack", {"G": g, "T": t, "Q": q}, tmp_path) == 11


def test_axi_lite_registers(tmp_path):
    parameters = {"G": 3, "T": 28, "Q": 16, "P": 4, "Lanes": 16, "RowsMax": 64, "AddrBits": 40}
    assert simulate("axi_lite_registers", parameters, tmp_path) == 21
