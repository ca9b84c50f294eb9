# SPDX-License-Identifier: Apache-2.0
"""The main job's document: its fixed names, its table and picture, and what happens when a row cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tilewright import demo
from tilewright.measure.launch import MeasureError, Method
from tilewright.measure.protocol import Spec

FIXED = {
    "method",
    "bits_per_weight",
    "bytes",
    "perplexity",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "resident_growth_bytes",
}
COMMON = {"threads": 1, "windows": {"speeches": [[1, 2]]}, "prompt": [1] * 100, "decode": 10, "repeats": 3}
FOUND = {
    "bits_per_weight": 4.0,
    "bytes": 5_000_000,
    "perplexity": {"speeches": 20.0, "encyclopedia": 15.0},
    "prefill_ns": [1_000_000_000, 500_000_000, 2_000_000_000],
    "decode_ns": [100_000_000, 200_000_000, 50_000_000],
    "resident_growth_bytes": 6_000_000,
    "resident_baseline_bytes": 1,
    "anonymous_growth_bytes": 5_500_000,
    "peak_growth_bytes": 7_000_000,
    "load_seconds": 0.5,
    "library": "made up",
    "generated": [[65], [66], [67]],
}


def rows(monkeypatch, run, methods: dict[str, Method]):
    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "why_absent", lambda runner: "not here" if runner == "absent" else None)
    return demo.measured_rows(methods, COMMON, lambda ids: "".join(map(chr, ids)), lambda *_: None)


@pytest.fixture
def document(monkeypatch) -> dict:
    methods = {
        "torch float32": Method("torch", "m"),
        "tilewright: FP8": Method("tilewright", "m"),
        "llama.cpp": Method("absent", "m"),
    }
    done, skipped = rows(monkeypatch, lambda _: FOUND, methods)
    return {
        "machine": {"processor": "A processor", "cores": 2, "isa": "avx2", "torch": "2.13"},
        "threads": 2,
        "model": {"name": "tiny.gguf"},
        "text": {name: {"windows": 1, "tokens_a_window": 512} for name in ("speeches", "encyclopedia")},
        "protocol": {"prompt_tokens": 100, "decode_tokens": 10, "repeats": 3},
        "questions": list(demo.QUESTIONS),
        "rows": done,
        "skipped": skipped,
        "seconds": 1.0,
    }


def test_rows_have_the_fixed_names_and_the_medians(document):
    assert all(set(row) >= FIXED for row in document["rows"])
    row = document["rows"][0]
    assert row["prefill_tokens_per_s"] == 100
    assert row["decode_tokens_per_s"] == 100
    assert row["perplexity"] == 20.0
    assert row["answers"] == ["A", "B", "C"]


def test_what_is_written_is_the_document_its_table_and_a_picture(document, tmp_path):
    paths = demo.write(document, tmp_path / "reports")
    assert {path.name for path in paths.values()} == {"demo.json", "demo.md", "demo.png"}
    assert json.loads(paths["json"].read_text(encoding="utf-8")) == document
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    table = [line for line in paths["md"].read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert table[0] == "| " + " | ".join(demo.HEADINGS) + " |"
    assert [line.split(" | ")[0] for line in table[1:]] == ["| torch float32", "| tilewright: FP8"]
    assert "Left out: llama.cpp: not here." in paths["md"].read_text(encoding="utf-8")


def test_a_failing_peer_is_left_out_with_its_reason(monkeypatch):
    def fail(_: Spec):
        raise MeasureError("it broke")

    done, skipped = rows(monkeypatch, fail, {"llama.cpp": Method("llama.cpp", "m")})
    assert (done, skipped) == ([], [{"method": "llama.cpp", "reason": "it broke"}])


@pytest.mark.parametrize("runner", ["torch", "tilewright"])
def test_a_failing_row_of_torch_or_ours_is_an_error(monkeypatch, runner):
    def fail(_: Spec):
        raise MeasureError("it broke")

    with pytest.raises(MeasureError, match="it broke"):
        rows(monkeypatch, fail, {"row": Method(runner, "m")})


def test_the_table_has_every_row_that_was_asked_for():
    methods = demo.table_methods(Path("m.gguf"), {"fireq": Path("a"), "unscaled": Path("b")})
    assert [method.runner for method in methods.values()] == ["torch", "torch", *["tilewright"] * 5, "llama.cpp"]
    options = [method.options for method in methods.values() if method.runner == "tilewright"]
    assert [option["act"] for option in options] == ["fp8", "int8", "fp8", "fp8", "int8"]
    assert [option["kv_bits"] for option in options] == [4, 4, 4, 16, 16]
    assert methods["tilewright: as the FP8 row, no RoPE-aware scaling"].model == "b"


@pytest.mark.model
def test_texts_and_questions_are_tokens_of_the_real_model(smollm2_gguf):
    from tilewright.models import load

    model = load(smollm2_gguf)
    windows = demo.texts(model, demo.QUICK)["speeches"]
    assert [len(window) for window in windows] == [demo.WINDOW] * demo.QUICK.windows
    asked = [model.tokenizer.decode(ids) for ids in demo.questions(model)]
    assert all(question in text for question, text in zip(demo.QUESTIONS, asked, strict=True))
    assert all(text.rstrip().endswith("<|im_start|>assistant") for text in asked)
