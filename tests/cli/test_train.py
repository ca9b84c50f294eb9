# SPDX-License-Identifier: Apache-2.0
"""`tw train`: a model that the other verbs take, a run that goes on, settings from files and options."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from tilewright.cli.app import app
from tilewright.cli.codes import ExitCode
from tilewright.data import corpus

RUN = CliRunner(env={"COLUMNS": "200"})
SIZES = ("--layers", "2", "--ratio", "1:1", "--width", "32", "--heads", "2", "--batch", "4", "--length", "32")


def invoke(*arguments):
    return RUN.invoke(app, [str(a) for a in arguments])


def trained(folder, *options):
    result = invoke("train", "-o", folder, "--json", *options)
    assert result.exit_code == ExitCode.OK, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(corpus("moby-dick", "calibration")[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("model")
    options = ("--steps", 24, "--lr", 1e-2, "--warmup", 2, "--evaluate-every", 8, "--save-every", 10)
    report = trained(folder, "--text", text, *SIZES, *options)
    assert report["steps"] == 24
    assert report["last_loss"] < report["first_loss"] - 1.0
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_the_folder_is_what_transformers_loads(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tilewright.nn.hybrid_linear_attention.modeling

    del tilewright
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.layer_names == ["gated_deltanet", "softmax"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = "Größe 日本 \n\t\x00 a  b"
    assert tokenizer(words)["input_ids"] == list(words.encode())
    assert tokenizer.decode(list(words.encode())) == words
    logits = model(torch.tensor([list(b"Call me")])).logits
    assert logits.shape == (1, 7, 256)


def test_eval_scores_the_model_that_was_trained(folder, text, tmp_path):
    from tilewright.models.hybrid import load_hybrid

    words = text.read_text()[-1000:].encode()[:65]
    piece = tmp_path / "piece.txt"
    piece.write_bytes(words)
    result = invoke("eval", folder, "--text", piece, "--window", 65, "--json")
    assert result.exit_code == ExitCode.OK, result.output
    tokens = torch.tensor([list(words)])
    with torch.inference_mode():
        logits = load_hybrid(folder).model(tokens).logits[0, :-1].double()
    expected = float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))
    # The same float32 logits; 64 terms of float64 in another order.
    assert json.loads(result.stdout)["nll"] == pytest.approx(expected, rel=64 * torch.finfo(torch.float64).eps)


def test_generate_continues_a_prompt(folder):
    arguments = ("generate", folder, "--prompt", "The whale", "--max-new-tokens", 12, "--json")
    first, again = invoke(*arguments), invoke(*arguments)
    assert first.exit_code == ExitCode.OK, first.output
    made = json.loads(first.stdout)
    assert (made["prompt_tokens"], made["new_tokens"], made["stopped_by"]) == (9, 12, "length")
    assert made["text"] == json.loads(again.stdout)["text"]


def test_formats_of_the_engine_are_refused(folder):
    result = invoke("generate", folder, "--prompt", "a", "--act", "fp8")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "runs in float; leave out --act and --kv" in result.stderr


def test_a_stopped_run_goes_on_with_its_own_settings(folder, text, tmp_path):
    """Ten steps, then the rest by --resume alone: the model of the run that was never stopped."""
    run = json.loads((folder / "run.json").read_text())
    part = tmp_path / "part"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(run))
    trained(part, "--config", config, "--steps", 10, "--set", "schedule=constant")
    whole = tmp_path / "whole"
    report = trained(whole, "--config", config, "--set", "schedule=constant")
    kept = json.loads((part / "run.json").read_text())
    kept["training"]["steps"] = 24
    (part / "run.json").write_text(json.dumps(kept))
    resumed = trained(part, "--resume")
    assert resumed["held_out_loss"] == report["held_out_loss"]
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_options_override_the_file(folder, text, tmp_path):
    report = trained(
        tmp_path / "m", "--config", folder / "run.json", "--steps", 1, "--mixer", "retnet", "--set", "clip=2"
    )
    run = json.loads((tmp_path / "m" / "run.json").read_text())
    assert (run["mixer"], run["width"], run["training"]["steps"], run["training"]["clip"]) == ("retnet", 32, 1, 2)
    assert report["steps"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mixer", "gated_deltanets"), "did you mean gated_deltanet"),
        (("--ratio", "0:1"), "0:1"),
        (("--text", "no-such-file"), "no-such-file: No such file"),
        (("--set", "weight_decoy=1"), "unknown training setting weight_decoy"),
        (("--length", "30000"), "more than length=30000 are needed"),
        (("--sequence-parallel", "2"), "sequence=2: a divisor of the 1 processes"),
        (("--heads", "5"), "5"),
        (("--tokenizer", "no-such-model"), "no-such-model"),
    ],
)
def test_wrong_settings_are_one_line_and_leave_nothing(text, tmp_path, options, message):
    result = invoke("train", "-o", tmp_path / "m", "--text", text, *SIZES, "--steps", 1, *options)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_a_run_is_not_overwritten(folder, text):
    result = invoke("train", "-o", folder, "--text", text, *SIZES)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "holds a run already" in result.stderr


def test_damaged_weights_are_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    result = invoke("generate", copy, "--prompt", "a")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "the hybrid model cannot be loaded" in result.stderr
    (copy / "run.json").write_text("{")
    result = invoke("train", "-o", copy, "--resume")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "run.json: not JSON" in result.stderr
