# SPDX-License-Identifier: Apache-2.0
"""The shipped text is what its SHA256SUMS says, its parts are disjoint, and absent text is a clear error."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tilewright.data import CORPORA, PARTS, corpus
from tilewright.data import text as text_module

FOLDER = Path(text_module.__file__).parent / "corpus"
SHIPPED = text_module.SHIPPED


def word_runs(text: str, length: int = 12) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_every_shipped_file_has_its_recorded_hash():
    rows = [line.split() for line in (FOLDER / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in rows} == {f"{name}.{part}.txt" for name in SHIPPED for part in PARTS}
    for digest, name in rows:
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", SHIPPED)
def test_calibration_and_evaluation_share_no_passage(name):
    calibration, evaluation = (word_runs(corpus(name, part)) for part in PARTS)
    # Ceremonial formulas ("the President of the United States ...") recur between addresses; passages do not.
    assert len(calibration & evaluation) <= 5
    assert min(len(calibration), len(evaluation)) > 10_000


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("part", PARTS)
def test_shipped_text_is_reflowed_prose(name, part):
    text = corpus(name, part)
    paragraphs = text.rstrip("\n").split("\n\n")
    assert len(paragraphs) > 50
    assert all("\n" not in paragraph and paragraph == paragraph.strip() for paragraph in paragraphs)


def test_unknown_names_and_parts_list_the_known_ones():
    with pytest.raises(ValueError, match="speeches, moby-dick, encyclopedia"):
        corpus("novel", "evaluation")
    with pytest.raises(ValueError, match="calibration, evaluation"):
        corpus(CORPORA[0], "test")


def test_absent_encyclopedia_names_the_way_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    monkeypatch.delenv(text_module.ENCYCLOPEDIA_VARIABLE, raising=False)
    monkeypatch.setattr(text_module, "ENCYCLOPEDIA_PACKAGE", "no_such_encyclopedia")
    with pytest.raises(FileNotFoundError, match="tw fetch encyclopedia"):
        corpus("encyclopedia", "evaluation")


def test_encyclopedia_parts_split_the_articles(monkeypatch, tmp_path):
    articles = {f"T{i}": {"title": f"T{i}", "extract": f" opening {i} "} for i in range(5)}
    path = tmp_path / "summaries.json"
    path.write_text(json.dumps(articles), encoding="utf-8")
    monkeypatch.setenv(text_module.ENCYCLOPEDIA_VARIABLE, str(path))
    calibration, evaluation = (corpus("encyclopedia", part) for part in PARTS)
    assert calibration == "T0\n\nopening 0\n\nT2\n\nopening 2\n\nT4\n\nopening 4\n"
    assert evaluation == "T1\n\nopening 1\n\nT3\n\nopening 3\n"


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"a": {"title": "x"}}', b"\xff\xfe", b'{"a": 1}'])
def test_a_damaged_encyclopedia_is_named(monkeypatch, tmp_path, content):
    path = tmp_path / "summaries.json"
    path.write_bytes(content)
    monkeypatch.setenv(text_module.ENCYCLOPEDIA_VARIABLE, str(path))
    with pytest.raises(ValueError, match=r"summaries\.json"):
        corpus("encyclopedia", "evaluation")
