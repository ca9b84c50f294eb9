# SPDX-License-Identifier: Apache-2.0
"""The claim machinery: discovery without registration, honest tables, files, exit codes."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest

import tilewright
from tilewright import claims
from tilewright.claims import (
    Claim,
    ClaimError,
    Experiment,
    Row,
    at_least,
    at_most,
    discover,
    exit_code,
    falling,
    run_claim,
)


def draw(values, figure):
    figure.subplots().plot(values.get("curve", [0, 1]))


def make(rows, slug="sample", **values):
    def run(experiment: Experiment):
        experiment.values.update(values)
        experiment.say("measuring")
        yield from rows

    return Claim(slug, "a sample", "nobody 2026", run, draw)


GOOD = Row("error", "0.1", 0.05, "<= 0.1", True)
BAD = Row("error", "0.1", 0.5, "<= 0.1", False)


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        (at_most("q", 1.0, 1.0), True),
        (at_most("q", 1.1, 1.0), False),
        (at_most("q", math.nan, 1.0), False),
        (at_least("q", 1.0, 1.0), True),
        (at_least("q", 0.9, 1.0), False),
        (at_least("q", math.nan, 1.0), False),
        (falling("q", [3, 2, 1]), True),
        (falling("q", [3, 3, 1]), False),
        (falling("q", [3, math.nan, 1]), False),
    ],
)
def test_rows_hold_exactly_when_their_condition_does(row, holds):
    assert row.holds is holds


def test_report_is_saved_as_json_and_png(tmp_path):
    heard = []
    report = run_claim(make([GOOD], curve=[1.0, 2.0]), quick=True, directory=tmp_path, say=heard.append)
    stored = json.loads((tmp_path / "sample.json").read_text())
    assert stored["rows"] == [{"quantity": "error", "paper": "0.1", "here": 0.05, "must": "<= 0.1", "holds": True}]
    assert stored["holds"] is True
    assert stored["quick"] is True
    assert stored["values"] == {"curve": [1.0, 2.0]}
    assert {"torch", "threads"} <= stored["machine"].keys()
    assert (tmp_path / "sample.png").read_bytes().startswith(b"\x89PNG")
    assert heard == ["measuring"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sample.json", "sample.png"]
    assert exit_code([report]) == 0


def test_one_row_that_fails_fails_the_claim(tmp_path):
    report = run_claim(make([GOOD, BAD]), directory=tmp_path)
    assert not report.holds
    assert exit_code([run_claim(make([GOOD]), directory=None), report]) == 1
    assert json.loads((tmp_path / "sample.json").read_text())["holds"] is False
    assert "| NO |" in report.markdown()


def test_claim_without_rows_does_not_hold():
    assert not run_claim(make([]), directory=None).holds


def test_error_inside_a_claim_is_a_failing_row_after_those_measured(tmp_path, capsys):
    def rows():
        yield GOOD
        raise FileNotFoundError("no model here")

    report = run_claim(make(rows()), directory=tmp_path)
    assert [row.holds for row in report.rows] == [True, False]
    assert report.rows[1].here == "FileNotFoundError: no model here"
    assert "no model here" in capsys.readouterr().err
    assert json.loads((tmp_path / "sample.json").read_text())["holds"] is False


def test_interrupt_is_not_swallowed(tmp_path):
    def rows():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        run_claim(make(rows()), directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_json_stays_valid_beside_nan(tmp_path):
    run_claim(make([at_most("q", math.nan, 1.0)], curve=[math.inf]), directory=tmp_path)

    def refuse(word):
        raise AssertionError(word)

    stored = json.loads((tmp_path / "sample.json").read_text(), parse_constant=refuse)
    assert stored["rows"][0]["here"] == "nan"


def test_markdown_escapes_bars():
    report = run_claim(make([Row("max |x|", "", 1.0, "any", True)]), directory=None)
    assert r"max \|x\|" in report.markdown()


@pytest.mark.parametrize("slug", ["", "Fire", "a b", "a--b", "../x"])
def test_slug_is_a_safe_file_name(slug):
    with pytest.raises(ClaimError, match="hyphens"):
        make([], slug=slug)


METHOD = """
from tilewright.claims import Claim, Row
CLAIM = Claim("SLUG", "title", "source", lambda e: [Row("q", "", 1.0, "any", True)], lambda v, f: None)
"""


def add_distribution(folder, slug, module):
    (folder / f"{module}.py").write_text(METHOD.replace("SLUG", slug))
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tilewright.claims]\n{slug} = {module}:CLAIM\n")


def test_method_of_another_distribution_appears_without_any_edit(tmp_path, monkeypatch):
    add_distribution(tmp_path, "other-method", "other_distribution_a")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "other-method" in discover()
    assert claims.find("other-method").title == "title"


def test_claim_file_in_a_method_folder_appears_without_any_edit(tmp_path, monkeypatch):
    method = tmp_path / "family_of_test" / "method_of_test"
    method.mkdir(parents=True)
    for package in (method.parent, method):
        (package / "__init__.py").write_text("")
    (method / "claim.py").write_text(METHOD.replace("SLUG", "folder-method"))
    monkeypatch.setattr(tilewright, "__path__", [*tilewright.__path__, str(tmp_path)])
    before = set(sys.modules)
    assert "folder-method" in discover()
    for name in set(sys.modules) - before:
        if "family_of_test" in name:
            del sys.modules[name]


def test_slug_registered_twice_names_both(tmp_path, monkeypatch):
    add_distribution(tmp_path, "twice", "other_distribution_b")
    add_distribution(tmp_path, "twice", "other_distribution_c")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ClaimError, match=r"registered twice: by .*distribution_[bc].* and by .*distribution_"):
        discover()


@pytest.mark.parametrize(
    ("source", "message"), [("1 / 0", "ZeroDivisionError"), ("", "no attribute 'CLAIM'"), ("CLAIM = 3", "is a int")]
)
def test_broken_claim_module_is_named(tmp_path, monkeypatch, source, message):
    add_distribution(tmp_path, "broken", "other_distribution_d")
    (tmp_path / "other_distribution_d.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "other_distribution_d", raising=False)
    with pytest.raises(ClaimError, match=f"other_distribution_d.*{message}"):
        discover()
    sys.modules.pop("other_distribution_d", None)


def test_unknown_slug_lists_near_ones(tmp_path, monkeypatch):
    add_distribution(tmp_path, "near-method", "other_distribution_e")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ClaimError, match="did you mean near-method"):
        claims.find("near-methud")
    with pytest.raises(ClaimError, match=r"known: .*near-method"):
        claims.find("zzz")


def _double(item, base=0):
    return 2 * item + base


def _where(item):
    import os

    import torch

    return item, os.getpid(), torch.get_num_threads()


def _three():
    return 3


def _refuse(item):
    raise ValueError(f"no {item}")


def test_work_is_spread_over_processes_in_order(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert claims.spread(_double, list(range(7))) == [2 * i for i in range(7)]
    assert claims.spread(_double, [1, 2], _three) == [5, 7]
    found = claims.spread(_where, [5, 6, 7])
    assert [item for item, _, _ in found] == [5, 6, 7]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {1}
    with pytest.raises(ValueError, match="no 1"):
        claims.spread(_refuse, [1, 2])


@pytest.mark.parametrize(("cores", "items"), [(1, [1, 2, 3]), (8, [4]), (None, [4, 5])])
def test_work_stays_here_where_processes_gain_nothing(monkeypatch, cores, items):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", None)
    assert claims.spread(_double, items, own=9) == [2 * i for i in items]
    assert claims.spread(_double, items, _three) == [2 * i + 3 for i in items]
    assert claims.spread(_double, items, _three, own=9) == [2 * i + 9 for i in items]
    assert claims.spread(_double, []) == []
