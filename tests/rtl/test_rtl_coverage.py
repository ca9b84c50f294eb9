# SPDX-License-Identifier: Apache-2.0
"""The reader of Verilator's coverage: on a bench of one module, and on one that leaves a line out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from rtl_coverage import BENCHES, SOURCES, WAIVED, missed, read
from simulate import run_bench


def test_lines_that_ran_and_lines_that_did_not(tmp_path: Path):
    environment = {"TILEWRIGHT_RTL_PATTERNS": "half"}
    run_bench("gearbox", {"In": 1, "Out": 3, "Width": 8}, tmp_path, environment, options=["--coverage-line"])
    lines = {"gearbox": read([tmp_path / "coverage.dat"])["gearbox"]}
    assert len(lines["gearbox"]) > 20
    assert missed(lines, WAIVED) == ([], [])
    unrun, _ = missed(lines, {})
    assert all("gearbox:" in line for line in unrun)
    assert any("rest = a % b" in line for line in unrun), "a function of constants never runs"
    assert missed(lines, WAIVED | {"gearbox": WAIVED["gearbox"] | {"left = count_q": "it runs"}})[1]


def test_records_of_two_runs_add_up(tmp_path: Path):
    keys = f"\x01f\x02{SOURCES}/fifo.sv\x01l\x027\x01S\x027-8,10"
    for name, count in (("a", 0), ("b", 3)):
        (tmp_path / f"{name}.dat").write_text(f"# SystemC::Coverage-3\nC '{keys}' {count}\n", encoding="utf-8")
    assert read(sorted(tmp_path.glob("*.dat"))) == {"fifo": {7: 3, 8: 3, 10: 3}}
    assert read([tmp_path / "a.dat"]) == {"fifo": {7: 0, 8: 0, 10: 0}}


def test_waivers_name_modules_and_benches_exist():
    assert all((SOURCES / f"{module}.sv").is_file() for module in WAIVED)
    assert len(BENCHES) >= 4


@pytest.mark.parametrize("text", ["no record", "C 'x' y"])
def test_other_lines_are_left_out(text: str, tmp_path: Path):
    (tmp_path / "a.dat").write_text(text, encoding="utf-8")
    assert read([tmp_path / "a.dat"]) == {}
