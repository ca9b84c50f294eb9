# SPDX-License-Identifier: Apache-2.0
"""`tw reproduce`: exit code 0 only when every row of every claim holds."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tilewright import claims
from tilewright.cli.app import app
from tilewright.cli.codes import ExitCode


def claim(slug: str, here: float) -> claims.Claim:
    """A claim with one row that holds when `here` is at most 1."""
    return claims.Claim(
        slug, f"Title of {slug}", "a paper", lambda _: [claims.at_most("error", here, 1.0)], lambda *_: None
    )


@pytest.fixture
def known(monkeypatch):
    found = {"good": claim("good", 0.5), "bad": claim("bad", 2.0)}
    monkeypatch.setattr(claims, "discover", lambda: found)


def invoke(tmp_path, *arguments: str):
    return CliRunner().invoke(app, ["reproduce", *arguments, "-o", str(tmp_path)])


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("arguments", "code"), [(["good"], 0), (["bad"], 1), (["--all"], 1), (["good", "--quick"], 0)])
def test_the_exit_code_follows_the_rows(arguments, code, tmp_path):
    result = invoke(tmp_path, *arguments)
    assert result.exit_code == code
    assert ("NO" in result.stdout) == (code == 1)


@pytest.mark.usefixtures("known")
def test_json_is_the_report_that_is_saved(tmp_path):
    result = invoke(tmp_path, "bad", "--json")
    document = json.loads(result.stdout)
    assert document["holds"] is False
    assert [row["here"] for row in document["rows"]] == [2.0]
    assert json.loads((tmp_path / "bad.json").read_text()) == document


@pytest.mark.usefixtures("known")
def test_list_names_every_claim(tmp_path):
    assert [row["slug"] for row in json.loads(invoke(tmp_path, "--list", "--json").stdout)] == ["good", "bad"]
    assert "Title of good" in invoke(tmp_path, "--list").stdout


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("arguments", [[], ["good", "--all"], ["--list", "--all"]])
def test_what_to_run_must_be_said_once(arguments, tmp_path):
    assert invoke(tmp_path, *arguments).exit_code == ExitCode.BAD_INPUT


@pytest.mark.usefixtures("known")
def test_an_unknown_slug_is_bad_input_and_not_a_failed_claim(tmp_path):
    result = invoke(tmp_path, "god")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "god" in result.stderr
