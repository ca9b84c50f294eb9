# SPDX-License-Identifier: Apache-2.0
"""Numbers reach the pages through blocks between markers, and only through them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def render(monkeypatch, tmp_path):
    """The script as a module, with its results in an empty folder."""
    spec = importlib.util.spec_from_file_location("render_docs", ROOT / "scripts" / "render_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_a_block_is_replaced_and_the_rest_stays(render):
    page = "before\n<!-- begin generated: x -->\nold\n<!-- end generated: x -->\nafter\n"
    once = render.with_block(page, "x", "new\n")
    assert once == "before\n<!-- begin generated: x -->\n\nnew\n\n<!-- end generated: x -->\nafter\n"
    assert render.with_block(once, "x", "new") == once


def test_a_page_without_markers_is_an_error(render):
    with pytest.raises(ValueError, match="no markers"):
        render.with_block("text", "x", "new")


def test_without_results_the_pages_say_which_command_makes_them(render):
    assert "make demo" in render.demo_block()
    assert "tw reproduce --all" in render.claims_block()


def test_a_recorded_claim_is_shown_with_its_verdict(render, tmp_path):
    row = {"quantity": "error", "paper": "1.0", "here": 2.0, "must": "<= 1", "holds": False}
    report = {
        "slug": "a-method", "title": "A method", "source": "a paper", "quick": True, "rows": [row], "values": {},
        "seconds": 3.2, "machine": {}, "holds": False,
    }  # fmt: skip
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "a-method.json").write_text(json.dumps(report))
    block = render.claims_block()
    assert "The claim **does not hold**; the short form, 3 s." in block
    assert "| error | 1.0 | 2 | <= 1 | NO |" in block
