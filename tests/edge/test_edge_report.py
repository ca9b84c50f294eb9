# SPDX-License-Identifier: Apache-2.0
"""`tw edge report`: shares against the cycle model, resources against the recorded counts, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tilewright.edge.contract import Tiling
from tilewright.edge.tellme import BITNET_0_73B, OURS, SMOLLM2_135M, XCK26, synthesis
from tilewright.edge.tellme.report import (
    CHUNK,
    CONTEXTS,
    FF_XCK26,
    KINDS,
    decode_seconds,
    layer_of,
    prompt_seconds,
    report,
    resources,
    roofline,
    rtl_config,
    utilisation,
)

TOP = Path(__file__).resolve().parents[2] / "rtl" / "src" / "accelerator.sv"


def test_a_token_is_the_rtls_run_where_memory_is_no_limit():
    """With memory faster than the ports only the schedule is left."""
    from tilewright.edge.tellme.cycles import layer_cycles

    fast = replace(rtl_config(SMOLLM2_135M), calibration=replace(OURS, bw_weight=1e12, bw_kv=1e12))
    found = decode_seconds(fast, 100)
    cycles = layer_cycles(layer_of(fast), fast.tiling, 99, 1)
    assert (sum(found.values()) - found["head (host)"]) * 250e6 == pytest.approx(sum(cycles.values()) * 30)
    slow = decode_seconds(rtl_config(SMOLLM2_135M), 100)
    assert slow["weights"] == rtl_config(SMOLLM2_135M).load_seconds() > found["weights"]
    assert slow["rows and look-up"] == found["rows and look-up"]


def test_shares_are_parts_of_the_time():
    config = rtl_config(BITNET_0_73B)
    for context in (1, 64, 4096):
        parts, shares = decode_seconds(config, context), utilisation(config, context)
        whole = sum(parts.values())
        chain = [share for unit, share in shares.items() if unit.startswith("look-up")] + [shares["norm and quantizer"]]
        # What is left of a row are the pipelines between its last look-up and memory's answer.
        assert 0.85 < sum(chain) * whole / parts["rows and look-up"] < 1
        assert shares["dequantizer and fuse"] < shares["look-up, sweeping"]
        others = [shares[unit] for unit in ("weight ports", "attention and cache ports", "descriptors", "host")]
        assert sum(others) + parts["rows and look-up"] / whole == pytest.approx(1)


def test_a_second_set_of_tables_hides_filling_but_for_a_matrix_first_block():
    two = rtl_config(BITNET_0_73B)
    one = replace(two, fill=27)
    # Six matrices of 19 blocks and down with 49, 27 cycles each; 21,728 cycles of sweeping. Sums leave eight a cycle:
    # the last block's take twice as long, less the eleven cycles that the look-up is ahead of them.
    late = 5 * (96 - 11) + 2 * (256 - 11)
    for config, fills in ((one, 163), (two, 7)):
        shares = utilisation(config, 64)
        share = shares["look-up, filling tables and waiting for sums to leave"] / shares["look-up, sweeping"]
        assert share == pytest.approx((fills * 27 + late) / 21728)
    parts = [decode_seconds(config, 64)["rows and look-up"] for config in (one, two)]
    assert (parts[0] - parts[1]) * 250e6 == pytest.approx(24 * 156 * 27)


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
    assert many["rows and look-up"] == pytest.approx(4 * one["rows and look-up"])
    assert many["attention"] > 4 * one["attention"]
    assert many["head (host)"] == config.head_seconds()
    assert f"RowsMax = {CHUNK}," in TOP.read_text(encoding="utf-8")


def test_a_layer_for_counting_streams_as_many_bytes_as_the_model_says():
    from tilewright.edge.contract.stream import beat_count

    config = rtl_config(BITNET_0_73B)
    layer = layer_of(config)
    linears = (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
    beats = sum(beat_count(one.weights, 0 if one.norm is None else len(one.norm)) for one in linears)
    assert beats * 96 * 24 == pytest.approx(config.weight_bytes(), rel=1e-3)


def test_resources_are_the_recorded_counts_times_how_many():
    recorded = json.loads(synthesis.FILE.read_text(encoding="utf-8"))["units"]
    found = resources()
    assert set(found["units"]) == {name for name, one in recorded.items() if one["count"]}
    for kind in KINDS:
        assert found["sum"][kind] == sum(one["count"] * one[kind] for one in recorded.values())
    assert found["xck26"] == {**vars(XCK26), "ff": FF_XCK26}
    assert found["exceeds_the_xck26_in"] == found["exceeds_the_paper_in"] == []
    assert found["sum"]["uram"] >= rtl_config(BITNET_0_73B).uram() == 48


def test_the_build_is_the_rtls_default():
    config = rtl_config(BITNET_0_73B, 200.0)
    assert config.tiling == Tiling(3, 28, 16, 4, lanes=8)
    assert f"Lanes = {config.tiling.lanes}," in TOP.read_text(encoding="utf-8")
    assert (config.fill, config.fused, config.overlap) == (0, False, False)
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
