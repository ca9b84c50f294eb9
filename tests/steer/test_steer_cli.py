# SPDX-License-Identifier: Apache-2.0
"""`tw steer` and `--steer` of generate, on SmolLM2: the command's text is the hooked model's."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tilewright.cli.app import app
from tilewright.steer.lineas.cli import parse_layers, read_sides


def run(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def maps(tmp_path_factory, smollm2_gguf):
    path = tmp_path_factory.mktemp("maps") / "maps.safetensors"
    out = run(
        "steer", "fit", smollm2_gguf, "-o", path, "--pair", "weather-animals", "--method", "lin_act", "--layers", "0-5",
        "--json",
    )  # fmt: skip
    facts = json.loads(out)
    assert (facts["places"], facts["coordinates"], facts["method"]) == (12, 12 * 576, "lin_act")
    return path


@pytest.mark.model
@pytest.mark.slow
def test_generate_gives_the_hooked_models_text(maps, smollm2_gguf):
    from tilewright.models import load, to_transformers
    from tilewright.steer import Steering

    prompt = "The best thing about the weekend was"
    out = run(
        "generate", smollm2_gguf, "-p", prompt, "--max-new-tokens", 12, "--steer", maps, "--strength", 0.5, "--json"
    )
    loaded = load(smollm2_gguf)
    theirs = to_transformers(loaded)
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad(), Steering.load(maps).transform(theirs, 0.5):
        wanted = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    plain = json.loads(run("generate", smollm2_gguf, "-p", prompt, "--max-new-tokens", 12, "--json"))["text"]
    got = json.loads(out)["text"]
    assert got == loaded.tokenizer.decode(wanted, skip_special_tokens=True)
    assert got != plain
    both = json.loads(
        run("steer", "generate", smollm2_gguf, "--steer", maps, "-p", prompt, "--max-new-tokens", 12,
            "--strength", 0, "--strength", 0.5, "--json")
    )  # fmt: skip
    assert [one["text"] for one in both["texts"]] == [plain, got]


@pytest.mark.model
@pytest.mark.slow
def test_eval_says_how_far_the_texts_are(maps, smollm2_gguf):
    out = run(
        "steer", "eval", smollm2_gguf, "--steer", maps, "--pair", "weather-animals", "--strength", 0, "--strength", 1,
        "--max-tokens", 64, "--json",
    )  # fmt: skip
    none, full = json.loads(out)["rows"]
    assert full["loss"] < none["loss"]
    assert full["target_score"] > none["target_score"]
    assert none["perplexity"] > 1


def test_texts_come_from_files_or_a_pair(tmp_path):
    one, two, empty = (tmp_path / n for n in ("a.txt", "b.txt", "c.txt"))
    one.write_text("first\n\n second \n")
    two.write_text("third")
    empty.write_text("\n")
    assert read_sides(one, two, None, "train") == (["first", "second"], ["third"])
    assert len(read_sides(None, None, "present-past", "held-out")[0]) == 64
    for wrong in ((one, None, None), (None, None, None), (one, two, "present-past")):
        with pytest.raises(ValueError, match="give texts once"):
            read_sides(*wrong, "train")
    with pytest.raises(ValueError, match=r"c.txt: holds no text"):
        read_sides(one, empty, None, "train")


def test_layers_are_numbers_and_ranges():
    assert parse_layers(None) is None
    assert parse_layers("0-3,8") == [0, 1, 2, 3, 8]
    with pytest.raises(ValueError, match="--layers a-b"):
        parse_layers("a-b")


def test_a_missing_file_is_one_line(smollm2_gguf):
    done = CliRunner().invoke(app, ["generate", str(smollm2_gguf), "-p", "x", "--steer", "nowhere.safetensors"])
    assert done.exit_code == 2
    assert "nowhere.safetensors: no such file; `tw steer fit`" in done.stderr
