# SPDX-License-Identifier: Apache-2.0
"""The cycle, memory and resource model: the paper's figures, identities, the search, and the verbs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tilewright.edge.contract import Tiling
from tilewright.edge.tellme import (
    BITNET_0_73B,
    OURS,
    PAPER_BUDGET,
    SMOLLM2_135M,
    XCK26,
    TellmeConfig,
    search,
)
from tilewright.edge.tellme.presets import PAPER

PAPERS = TellmeConfig(BITNET_0_73B)
AT_OURS = TellmeConfig(BITNET_0_73B, calibration=OURS, fill=27, fused=True)


def test_counts_of_the_paper() -> None:
    assert BITNET_0_73B.weights == 679_477_248
    assert PAPERS.uram() == PAPER["uram_weight_buffer"]
    assert PAPERS.cascade == 2
    assert PAPERS.layer_cycles() == 21728
    assert replace(PAPERS, fill=27).layer_cycles() == 26129
    assert PAPERS.weight_bytes() == pytest.approx(PAPER["vectors"] / 5 * 96)
    assert replace(PAPERS, packing="dense").weight_bytes() == pytest.approx(146.0e6, rel=1e-3)
    assert PAPERS.kv_bytes(1) == 147456


def test_predictions_with_the_fitted_parameters() -> None:
    assert PAPERS.tokens_per_s() == pytest.approx(25, abs=1)
    assert PAPERS.ttft(64) == pytest.approx(0.45, abs=0.02)
    assert PAPERS.ttft(128) == pytest.approx(0.96, abs=0.03)
    assert 1 / replace(PAPERS, calibration=OURS).linear_seconds() == pytest.approx(479, abs=1)
    assert 1 / replace(PAPERS, calibration=OURS, fill=27).linear_seconds() == pytest.approx(399, abs=1)


@pytest.mark.parametrize("q", [8, 16, 24, 32])
def test_uram_follows_the_corrected_formula(q: int) -> None:
    """40, 48, 48 and 64 as the paper's published total tells apart."""
    assert replace(PAPERS, tiling=Tiling(3, 28, q, 4)).uram() == {8: 40, 16: 48, 24: 48, 32: 64}[q]


@pytest.mark.parametrize("p", [1, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 13, 64])
def test_key_rows_of_reversed_prefill(p: int, tokens: int) -> None:
    config = replace(PAPERS, tiling=Tiling(3, 28, 16, p))
    assert config.key_rows(tokens) == sum(high + 1 for high in range(tokens - 1, -1, -p))
    if tokens % p == 0:
        assert config.key_rows(tokens) == tokens**2 / (2 * p) + tokens / 2


def test_fusing_sweeps_amortises_the_filling() -> None:
    unfused, fused = replace(PAPERS, fill=27), replace(PAPERS, fill=27, fused=True)
    assert unfused.linear_cycles(1536, 1536) / PAPERS.linear_cycles(1536, 1536) == pytest.approx(1.28, abs=0.01)
    assert fused.linear_cycles(1536, 4608) / PAPERS.linear_cycles(1536, 4608) == pytest.approx(1.09, abs=0.01)
    assert PAPERS.layer_cycles() < fused.layer_cycles() < unfused.layer_cycles()
    assert replace(PAPERS, fused=True).layer_cycles() == PAPERS.layer_cycles()


def test_the_papers_resources_are_the_models_at_its_point() -> None:
    found = replace(PAPERS, fill=27).resources()
    assert vars(found) == pytest.approx(vars(PAPER_BUDGET))
    assert found.fits(XCK26)
    bigger = replace(PAPERS, fill=27, tiling=Tiling(3, 28, 20, 4)).resources()
    assert not bigger.fits(PAPER_BUDGET)


def test_our_cycles_under_the_papers_memory_and_host_beat_its_figures() -> None:
    assert AT_OURS.calibration.bw_weight == PAPERS.calibration.bw_weight
    assert AT_OURS.head_seconds() == PAPERS.head_seconds()
    assert AT_OURS.resources().fits(PAPER_BUDGET)
    assert AT_OURS.tokens_per_s() >= 25
    assert AT_OURS.ttft(64) <= 0.45
    assert AT_OURS.ttft(128) <= 0.96


def test_overlap_never_costs_and_pieces_cover_the_matrix() -> None:
    for t, q in ((14, 8), (14, 32), (28, 16)):
        config = replace(AT_OURS, tiling=Tiling(3, t, q, 2), overlap=True)
        for sweep in config.sweeps():
            pieces = config._pieces(*sweep)
            assert sum(outputs for _, outputs in pieces) == sweep[1]
            assert all(config.tiling.blocks(i) * config.tiling.padded_outputs(o) <= 4096 * q // 2 for i, o in pieces)
        assert config.tokens_per_s() >= replace(config, overlap=False).tokens_per_s()


def test_the_search_stays_inside_the_budget_and_finds_more() -> None:
    found = search(BITNET_0_73B)
    assert all(one.config.resources().fits(PAPER_BUDGET) for one in found)
    assert found[0].reaches
    assert found[0].score == max(one.score for one in found if one.reaches)


def test_bad_parameters_are_named() -> None:
    with pytest.raises(ValueError, match="q = 3"):
        TellmeConfig(BITNET_0_73B, Tiling(3, 28, 3, 4))
    with pytest.raises(ValueError, match="f_mhz"):
        TellmeConfig(BITNET_0_73B, f_mhz=0)
    with pytest.raises(ValueError, match="kind"):
        PAPERS.cycles("rope")  # type: ignore[arg-type]


def test_the_verb_prints_the_report() -> None:
    from tilewright.edge.tellme.cli import app

    runner = CliRunner()
    done = runner.invoke(app, ["estimate", "smollm2-135m", "--clock", "100", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    config = TellmeConfig(SMOLLM2_135M, calibration=OURS, f_mhz=100, fill=27, fused=True)
    assert report["decode_tokens_per_s"]["64"] == config.tokens_per_s()
    assert report["calibrated"]["bw_weight"] == 9.5e9
    assert "decode_tokens_per_s 64" in runner.invoke(app, ["estimate", "bitnet-0.73b", "--paper"]).stdout
    assert runner.invoke(app, ["estimate", "bitnet-7b"]).exit_code != 0
