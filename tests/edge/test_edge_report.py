# SPDX-License-Identifier: Apache-2.0
"""`tw edge report`: shares against the cycle model, resources against the recorded counts, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tilewright.edge.contract import Tiling
from tilewright.edge.tellme import BITNET_0_73B, SMOLLM2_135M, XCK26, synthesis
from tilewright.edge.tellme.report import (
    CHUNK,
    CONTEXTS,
    FF_XCK26,
    KINDS,
    prompt_seconds,
    report,
    resources,
    roofline,
    rtl_config,
    utilisation,
)


def test_units_that_take_turns_fill_the_time():
    """Loading, look-up, cache, rows and the host are a chain; the dequantizer works beside the look-up."""
    config = rtl_config(BITNET_0_73B)
    for context in (1, 64, 4095):
        shares = utilisation(config, context)
        beside = shares.pop("dequantizer and fuse")
        assert sum(shares.values()) == pytest.approx(1)
        assert 0 < beside < shares["look-up, sweeping"]


def test_filling_tables_is_the_part_of_the_look_up_that_a_second_set_would_save():
    shares = utilisation(rtl_config(BITNET_0_73B), 64)
    # 19 blocks for six of the matrices and 49 for down, 27 cycles each; 21,728 cycles of sweeping.
    assert shares["look-up, filling tables"] / shares["look-up, sweeping"] == pytest.approx(163 * 27 / 21728)


def test_the_roof_bounds_every_point():
    found = roofline(rtl_config(SMOLLM2_135M))
    assert found["peak"] == 28 * 3 * 16 * 250e6
    for point in found["tokens"].values():
        roof = min(found["peak"], point["products_per_byte"] * found["bytes_per_second"])
        assert 0 < point["products_per_second"] < roof


def test_a_prompt_loads_the_weights_once_a_chunk():
    config = rtl_config(BITNET_0_73B)
    assert prompt_seconds(config, 16)["weights"] == config.load_seconds()
    assert prompt_seconds(config, 17)["weights"] == pytest.approx(2 * config.load_seconds())
    one, many = prompt_seconds(config, 16), prompt_seconds(config, 64)
    assert many["look-up"] == pytest.approx(4 * one["look-up"])
    top = (Path(__file__).resolve().parents[2] / "rtl" / "src" / "accelerator.sv").read_text()
    assert f"RowsMax = {CHUNK}," in top


def test_resources_are_the_recorded_counts_times_how_many():
    recorded = json.loads(synthesis.FILE.read_text(encoding="utf-8"))["units"]
    found = resources()
    assert set(found["units"]) == {name for name, one in recorded.items() if one["count"]}
    for kind in KINDS:
        assert found["sum"][kind] == sum(one["count"] * one[kind] for one in recorded.values())
    assert found["xck26"] == {**vars(XCK26), "ff": FF_XCK26}
    assert found["exceeds_the_xck26_in"][4] == [kind for kind in KINDS if found["sum"][kind] > found["xck26"][kind]]
    assert found["exceeds_the_xck26_in"][2] == []
    saved = synthesis.study("attention, P = 2").lut - recorded["attention"]["lut"]
    assert found["sum_with_2_queries"]["lut"] - found["sum"]["lut"] == saved < 0
    assert found["sum"]["uram"] >= rtl_config(BITNET_0_73B).uram() == 48


def test_the_build_is_the_rtls_default():
    config = rtl_config(BITNET_0_73B, 200.0)
    assert config.tiling == Tiling(3, 28, 16, 4)
    assert (config.fill, config.fused, config.overlap) == (27, False, False)
    assert report(BITNET_0_73B, 200.0)["clock_mhz"] == 200.0


def test_the_verb_writes_tables_pictures_and_json(tmp_path: Path):
    from tilewright.edge.tellme.cli import app

    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(app, ["report", "smollm2-135m", "-o", str(tmp_path / "new"), "--clock", "100", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "new" / "report.json").read_text())
    assert document == json.loads(done.stdout)
    text = (tmp_path / "new" / "report.md").read_text()
    rate = 1 / sum(document["decode_seconds"][str(CONTEXTS[0])].values())
    assert f"| {rate:.1f} |" in text
    assert "| tlmm_core | 1 |" in text
    for name in ("phases", "roofline", "resources"):
        assert f"({name}.png)" in text
        assert (tmp_path / "new" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_there_are_tables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tilewright.edge.tellme.report import save

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    paths = save(report(SMOLLM2_135M), tmp_path)
    assert set(paths) == {"json", "md"}
    assert "![" not in paths["md"].read_text()


def test_an_unknown_study_is_named():
    with pytest.raises(ValueError, match="study"):
        synthesis.study("look-up, guessed")
