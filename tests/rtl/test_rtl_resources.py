# SPDX-License-Identifier: Apache-2.0
"""What the units take of the chip: numbers belong to the sources, do not grow, and bear the paper's argument."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from rtl_resources import DRIVER, NUMBERS, STUDIES, UNITS, closure, measure, source_hash

from tilewright.edge.tellme.config import PAPER_BUDGET
from tilewright.edge.tellme.report import FF_PAPER
from tilewright.edge.tellme.synthesis import study, total

RECORDED = json.loads(NUMBERS.read_text(encoding="utf-8"))
ALL = [("units", name, unit) for name, unit in UNITS.items()] + [
    ("studies", name, unit) for name, unit in STUDIES.items()
]
Q = 16


@pytest.mark.parametrize(("kind", "name", "unit"), ALL, ids=lambda value: value if isinstance(value, str) else "")
def test_recorded_numbers_are_of_these_sources(kind, name, unit):
    record = RECORDED[kind].get(name)
    assert record is not None, "run scripts/rtl_resources.py"
    assert record["source"] == source_hash(unit, name), f"{name} changed; run scripts/rtl_resources.py"
    assert record["count"] == unit.count


@pytest.mark.parametrize(
    ("kind", "name", "unit"),
    [one for one in ALL if one[2].quick],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_unit_takes_no_more_than_recorded(kind, name, unit):
    pytest.importorskip("pyosys", reason="the pyosys wheel is not installed")
    now, record = measure(name, unit), RECORDED[kind][name]
    for key in ("lut", "lutram", "ff", "dsp", "bram", "uram"):
        assert now[key] <= 1.05 * record[key], f"{name}: {now[key]} {key.upper()}, recorded are {record[key]}"


def test_the_accelerator_elaborates_in_a_second_tool():
    """Yosys' strict frontend finds no latch, no loop, no second driver, and no name used before it is declared."""
    pytest.importorskip("pyosys", reason="the pyosys wheel is not installed")
    lines = [
        "read_slang --top accelerator " + " ".join(map(str, closure("accelerator"))),
        "check -assert",
        "select -assert-none t:$dlatch t:$_DLATCH_*",
        "select -assert-any t:$*ff*",
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_a_full_table_takes_less_than_half_tables_and_selection():
    """At equal (T, Q, G): one lane's look-ups, and 16 lanes with what fills their tables."""
    select, half, full = (study(f"look-up, {one}").lut for one in ("select", "half table", "full table"))
    fill = study("tables' sums, G = 3").lut
    assert full <= 0.55 * select
    assert full <= 0.9 * half
    assert fill + Q * full <= 0.55 * Q * select
    assert fill + Q * full <= 0.9 * (fill + Q * half)


def test_three_weights_an_index_take_the_least_a_weight():
    """84 weights a vector and 16 lanes, tables' sums included."""
    lanes = {3: study("look-up, full table"), **{g: study(f"look-up, full table, G = {g}") for g in (2, 4)}}
    assert {one.parameters["T"] * one.parameters["G"] for one in lanes.values()} == {84}
    cost = {g: (study(f"tables' sums, G = {g}").lut + Q * lane.lut) / (84 * Q) for g, lane in lanes.items()}
    assert min(cost, key=lambda g: cost[g]) == 3


def test_a_bank_of_weights_is_two_uram():
    bank = study("a bank of weights")
    assert bank.parameters == {"Width": 144, "Words": 4096}
    assert (bank.uram, bank.lut, bank.bram) == (2, 0, 0)
    assert RECORDED["units"]["weight_buffer"]["uram"] == 48


def test_the_core_stays_below_the_papers():
    """TLMM with its fuse takes 43,137 LUTs there."""
    core = RECORDED["units"]["tlmm_core"]
    assert core["parameters"].keys() == {"BeatsMax", "BlocksMax", "Banks"}, "G, T, Q at their defaults: 3, 28, 16"
    assert core["lut"] < 43137


def test_all_units_together_take_no_more_than_the_papers_accelerator():
    found, ff = total()
    assert found.fits(PAPER_BUDGET)
    assert ff <= FF_PAPER
