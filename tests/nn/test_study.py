# SPDX-License-Identifier: Apache-2.0
"""The hybrid study: its grid, its file that can be resumed, its ranks; a few steps on tiny stacks."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="hybrid stacks are transformers models")
scipy_stats = pytest.importorskip("scipy.stats")

from tilewright.nn.hybrid_linear_attention import _study_cells, _study_report, study  # noqa: E402
from tilewright.nn.hybrid_linear_attention._study_cells import Cell, Setting, build, distances, execute  # noqa: E402
from tilewright.nn.hybrid_linear_attention.study import Study, StudyError, kendall, run_study  # noqa: E402

TINY = Setting(num_layers=2, hidden_size=16, num_heads=2, steps=2, batch=2, length=24, pairs=3, evaluation=64)
GRID = Study(TINY, ("deltanet", "hgrn"), ("pure", "1:1", "full"), (1e-3, 1e-2), seeds=2)


def made_up(setting, cell):
    """A record without a training: the score is a function of the cell."""
    score = random.Random(cell.key).random()
    return {"mixer": cell.mixer, "ratio": cell.ratio, "score": score, "layers": [], "seconds": 0.0}


@pytest.mark.parametrize("seed", range(5))
def test_kendall_is_scipys(seed):
    drawn = random.Random(seed)
    x, y = ([drawn.randrange(4) for _ in range(7)] for _ in range(2))
    assert kendall(x, y) == pytest.approx(scipy_stats.kendalltau(x, y).statistic)
    assert math.isnan(kendall([1, 1], [1, 2]))


def test_softmax_stands_once_in_the_grid():
    assert GRID.groups == [
        ("deltanet", "pure"),
        ("deltanet", "1:1"),
        ("hgrn", "pure"),
        ("hgrn", "1:1"),
        ("softmax", "full"),
    ]
    shared = replace(GRID, tune="mixer")
    assert [GRID.tuned_on(*g) for g in GRID.groups] == GRID.groups
    assert shared.tuned_on("hgrn", "1:1") == ("hgrn", "pure")
    assert shared.tuned_on("softmax", "full") == ("softmax", "full")


@pytest.mark.parametrize("tune", ["cell", "mixer"])
def test_every_seed_runs_at_the_rate_that_was_best_for_the_first(monkeypatch, tune):
    monkeypatch.setattr(study, "execute", made_up)
    outcome = run_study(replace(GRID, tune=tune))
    for mixer, ratio in GRID.groups:
        group = outcome.study.tuned_on(mixer, ratio)
        tried = {rate: outcome.records[Cell(*group, rate, 0).key]["score"] for rate in GRID.rates}
        best = max(tried, key=tried.get)
        assert outcome.best_rate(mixer, ratio) == best
        scores = [outcome.records[Cell(mixer, ratio, best, seed).key]["score"] for seed in range(2)]
        assert outcome.scores(mixer, ratio) == scores
    order = outcome.ranking("pure")
    assert outcome.mean(order[0], "pure") >= outcome.mean(order[1], "pure")


def test_a_loss_ranks_the_other_way_round(monkeypatch):
    monkeypatch.setattr(study, "execute", made_up)
    outcome = run_study(replace(GRID, setting=replace(TINY, task="lm")))
    assert outcome.mean(outcome.ranking("pure")[0], "pure") <= outcome.mean(outcome.ranking("pure")[1], "pure")
    tried = {rate: outcome.records[Cell("hgrn", "pure", rate, 0).key]["score"] for rate in GRID.rates}
    assert outcome.best_rate("hgrn", "pure") == min(tried, key=tried.get)


def test_a_stopped_study_goes_on_where_it_was(monkeypatch, tmp_path):
    path, done = tmp_path / "study.json", []

    def counted(setting, cell):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(cell.key)
        return made_up(setting, cell)

    monkeypatch.setattr(study, "execute", counted)
    with pytest.raises(KeyboardInterrupt):
        run_study(GRID, out=path)
    assert list(json.loads(path.read_text())["records"]) == done
    first = list(done)
    done.append("the interruption")
    outcome = run_study(GRID, out=path)
    assert not set(first) & set(done[5:])
    monkeypatch.setattr(study, "execute", made_up)
    assert outcome.records == run_study(GRID).records
    stored = json.loads(path.read_text())
    assert [(g["mixer"], g["ratio"]) for g in stored["groups"]] == GRID.groups
    before = path.read_bytes()
    run_study(GRID, out=path)
    assert path.read_bytes() == before


def test_more_seeds_reuse_what_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "execute", made_up)
    run_study(GRID, out=tmp_path / "s.json")
    said = []
    run_study(replace(GRID, seeds=3), out=tmp_path / "s.json", say=said.append)
    assert len(said) == len(GRID.groups)


def test_a_file_of_another_study_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "execute", made_up)
    path = tmp_path / "study.json"
    run_study(GRID, out=path)
    with pytest.raises(StudyError, match="steps=2, not 3; use its settings or another file"):
        run_study(replace(GRID, setting=replace(TINY, steps=3)), out=path)
    path.write_text("{}")
    with pytest.raises(StudyError, match="is no study's file"):
        run_study(GRID, out=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixers": ("hgrm",)}, "hgrm"),
        ({"ratios": ("0:1",)}, "0:1"),
        ({"seeds": 0}, "at least one"),
        ({"tune": "none"}, "'cell' or 'mixer'"),
    ],
)
def test_a_bad_grid_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GRID, **change)
    with pytest.raises(ValueError, match="choose one of mqar, kv, lm"):
        Setting(task="mqra")


@pytest.mark.parametrize("task", ["mqar", "kv", "lm"])
def test_a_cell_trains_and_is_measured(task):
    setting = replace(TINY, task=task, text="speeches")
    record = execute(setting, Cell("gated_deltanet", "1:1", 1e-3, 0))
    assert record["layers"] == [1]
    assert record == {**execute(setting, Cell("gated_deltanet", "1:1", 1e-3, 0)), "seconds": record["seconds"]}
    assert json.loads(json.dumps(record))["mixer"] == "gated_deltanet"
    if task == "lm":
        assert 3 < record["score"] < 8
    else:
        assert 0 <= record["score"] <= 1
        assert all(0 < d < setting.length for d in record["by_distance"])


def test_cells_of_a_seed_share_their_weights():
    models = [build(TINY, Cell(mixer, ratio, 1e-3, 0)) for mixer, ratio in (("hgrn", "1:1"), ("gla", "1:1"))]
    first, second = (dict(model.named_parameters()) for model in models)
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mixer.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        assert torch.equal(first[name], second[name])


def test_short_convolutions_can_be_switched_off():
    off = build(replace(TINY, short_conv=False), Cell("deltanet", "pure", 1e-3, 0))
    assert not any("conv" in name for name, _ in off.named_parameters())
    assert any("conv" in name for name, _ in build(TINY, Cell("deltanet", "pure", 1e-3, 0)).named_parameters())


def test_a_training_that_diverges_is_a_record(monkeypatch):
    from tilewright import train

    class Bad(train.Trainer):
        def run(self, **_):
            raise train.TrainingError("step 0: loss nan")

    monkeypatch.setattr(train, "Trainer", Bad)
    record = execute(TINY, Cell("gla", "pure", 1e-3, 0))
    assert record["score"] == 0.0
    assert "nan" in record["diverged"]


def test_distances_are_to_the_first_occurrence():
    tokens = torch.randint(0, 4, (3, 12))
    found = distances(tokens)
    for b in range(3):
        for t in range(12):
            assert found[b, t] == t - tokens[b].tolist().index(int(tokens[b, t]))


def test_the_command_prints_a_table_and_saves(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "execute", lambda s, c: {**made_up(s, c), "flops_per_token": 10.0})
    out = tmp_path / "study.json"
    arguments = ["--mixers", "gla,retnet", "--ratios", "pure,3:1,full", "--num-layers", "4", "--out", str(out)]
    assert study.main([*arguments, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| gla |" in printed
    assert "Kendall's tau with pure" in printed
    assert "Softmax in all layers" in printed
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_processes_find_what_one_finds():
    small = replace(GRID, mixers=("hgrn",), ratios=("pure",), rates=(1e-3,))
    alone, together = (run_study(small, workers=workers).records for workers in (1, 2))
    for key in alone:
        assert {**alone[key], "seconds": 0} == {**together[key], "seconds": 0}


def test_names_of_all_and_of_some():
    assert study.names("all", study.MIXERS) == study.MIXERS
    assert study.names("gla, hgrn,", study.MIXERS) == ("gla", "hgrn")


def test_the_table_has_a_column_for_each_ratio(monkeypatch):
    monkeypatch.setattr(study, "execute", made_up)
    lines = _study_report.table(run_study(GRID)).splitlines()
    assert lines[0] == "| mqar: accuracy | pure | 1:1 |"
    assert lines[2].startswith("| deltanet | 0.")
    assert _study_cells.TASKS == ("mqar", "kv", "lm")
