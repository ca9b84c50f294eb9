# SPDX-License-Identifier: Apache-2.0
"""`tw linearize` on a tiny GGUF file, then `tw eval` and `tw generate` on its folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tilewright import linearize, models
from tilewright.cli.app import app
from tilewright.cli.codes import ExitCode
from tilewright.cli.linearize import parse_layers, split_settings
from tilewright.linearize.native import to_language_model
from tilewright.linearize.runner import Runner
from tilewright.models.engine import Engine

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from tiny_models import random_weights, tiny_config, write_gguf


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    config = tiny_config(max_position_embeddings=256)
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", config, random_weights(config))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("abcabcab cab bacab " * 200, encoding="utf-8")
    return path


SHORT = ("--steps", 4, "--length", 24, "--lr", "1e-2", "--window", 8)


@pytest.fixture(scope="module")
def folder(source, text, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("made") / "m"
    done = invoke("linearize", source, "-o", made, "--text", text, *SHORT, "--json")
    assert done.exit_code == ExitCode.OK, done.stderr
    report = json.loads(done.stdout)
    assert report["layers"] == [0, 1]
    assert report["config"]["window_size"] == 8
    assert report["report"]["steps"] == 4
    assert len(report["report"]["losses"]) == 4
    return made


def test_the_folder_holds_the_trained_model(folder, source):
    loaded = linearize.load(folder)
    assert loaded.training["recipe"]["lr"] == 1e-2
    base = models.to_transformers(models.load(source), dequantize=True).state_dict()
    changed = {name for name, tensor in loaded.model.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkv"}


def test_eval_measures_it(folder, text):
    done = invoke("eval", folder, "--text", text, "--window", 64, "--max-tokens", 256, "--json")
    assert done.exit_code == ExitCode.OK, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == 256 - 4
    assert 1 < found["perplexity"] < 1e6


def test_generate_gives_the_tokens_of_the_native_engine(folder):
    done = invoke("generate", folder, "--prompt", "abcab", "--max-new-tokens", 12, "--json")
    assert done.exit_code == ExitCode.OK, done.stderr
    loaded = linearize.load(folder)
    ids = loaded.tokenizer("abcab")["input_ids"]
    new = list(Engine(to_language_model(loaded), 64).generate(ids, max_new_tokens=12))
    assert json.loads(done.stdout)["text"] == loaded.tokenizer.decode(new, skip_special_tokens=True)


def test_a_form_without_native_kernels_continues_as_the_whole_text_would(source, tmp_path):
    done = invoke("linearize", source, "-o", tmp_path / "m", "--variant", "gsa", "--window", 4, "--steps", 0)
    assert done.exit_code == ExitCode.OK, done.stderr
    done = invoke("generate", tmp_path / "m", "--prompt", "abcab", "--max-new-tokens", 12, "--json")
    assert done.exit_code == ExitCode.OK, done.stderr
    loaded = linearize.load(tmp_path / "m")
    ids = loaded.tokenizer("abcab")["input_ids"]
    runner, new = Runner(loaded.model, 256), []
    for _ in range(12):
        new.append(int(runner.logits([*ids, *new])[-1].argmax()))
        if new[-1] in loaded.config.eos_token_ids:
            break
    assert json.loads(done.stdout)["text"] == loaded.tokenizer.decode(new, skip_special_tokens=True)


def test_steps_of_zero_convert_only(source, tmp_path):
    made = tmp_path / "m"
    settings = ("--variant", "gsa", "--set", "pool=4", "--layers", "1", "--steps", 0)
    done = invoke("linearize", source, "-o", made, *settings)
    assert done.exit_code == ExitCode.OK, done.stderr
    assert done.stdout == f"{made}: 1 of 2 layers converted, method liger\n"
    loaded = linearize.load(made)
    assert loaded.linearization.config.pool == 4
    base = models.to_transformers(models.load(source), dequantize=True).state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--method", "rwkv"), "method 'rwkv' is not known"),
        (("--variant", "rwkv"), "variant='rwkv'"),
        (("--set", "windowsize=3"), "did you mean 'window_size'"),
        (("--layers", "one"), "--layers 'one'"),
        (("--layers", "7"), "layers holds 7"),
        (("--text", "nothing.txt"), "nothing.txt: no such file"),
        (("--resume",), "there is no"),
        (("--steps", "1", "--length", "100000000"), "length=100000000"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(source, tmp_path, arguments, what):
    done = invoke("linearize", source, "-o", tmp_path / "m", *arguments)
    assert done.exit_code == ExitCode.BAD_INPUT
    assert what in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_formats_of_the_engine_are_refused(folder):
    done = invoke("generate", folder, "--prompt", "abc", "--act", "int8")
    assert done.exit_code == ExitCode.BAD_INPUT
    assert "leave out --act and --kv" in done.stderr


def test_a_foreign_folder_is_not_replaced(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = invoke("linearize", source, "-o", tmp_path, "--steps", 0)
    assert done.exit_code == ExitCode.BAD_INPUT
    assert "notes.txt" in done.stderr


def test_layers_as_text():
    assert parse_layers("all") == "all"
    assert parse_layers("0-2, 5,7-7") == [0, 1, 2, 5, 7]


def test_settings_go_where_they_belong():
    liger = linearize.method("liger")
    config, recipe = split_settings(liger, {"variant": "gsa", "r": 4})
    assert (config.variant, recipe.r) == ("gsa", 4)


def test_a_conversation_goes_on_from_the_state(folder):
    """The second turn begins with every token held: only the new ones are computed, and the text is the same."""
    loaded = linearize.load(folder)
    runner, fresh = Runner(loaded.model, 256), Runner(loaded.model, 256)
    first = list(runner.generate([5, 6, 7], max_new_tokens=4, stop_tokens=()))
    held = list(runner.held)
    turn = [*held, first[-1], 9, 10]
    asked = []
    forward = runner.forward
    runner.forward = lambda ids, keep=1: (asked.append(len(ids)), forward(ids, keep))[1]
    assert list(runner.generate(turn, max_new_tokens=4, stop_tokens=(), reuse=True)) == list(
        fresh.generate(turn, max_new_tokens=4, stop_tokens=())
    )
    assert asked[0] == 3
    with pytest.raises(ValueError, match="exceed max_length"):
        next(runner.generate([5] * 250, max_new_tokens=20))
    with pytest.raises(ValueError, match=r"needed 1 \.\. 256"):
        Runner(loaded.model, 300)


def test_an_interrupted_training_goes_on_bit_for_bit(source, text, tmp_path, monkeypatch):
    from tilewright.linearize import tuning
    from tilewright.train import Trainer

    arguments = ("linearize", source, "--text", text, *SHORT, "--json")
    whole = json.loads(invoke(*arguments, "-o", tmp_path / "whole").stdout)
    step = Trainer._step

    def interrupted(self, number):
        if number == 3:
            raise RuntimeError("the machine stopped")
        return step(self, number)

    monkeypatch.setattr(tuning, "_SAVE_EVERY", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        assert invoke(*arguments, "-o", tmp_path / "m").exit_code != ExitCode.OK
    assert not (tmp_path / "m").exists()
    again = invoke(*arguments, "-o", tmp_path / "m")
    assert again.exit_code == ExitCode.BAD_INPUT
    assert "--resume" in again.stderr
    resumed = json.loads(invoke(*arguments, "-o", tmp_path / "m", "--resume").stdout)
    assert resumed["report"]["losses"] == whole["report"]["losses"]
    states = [linearize.load(tmp_path / name).model.state_dict() for name in ("m", "whole")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "whole"]


def test_hedgehog_is_found_by_its_folder(source, text, tmp_path):
    made = tmp_path / "m"
    training = ("--steps", 2, "--set", "distill_steps=3", "--length", 24, "--window", 8)
    done = invoke("linearize", source, "-o", made, "--method", "hedgehog", "--text", text, *training)
    assert done.exit_code == ExitCode.OK, done.stderr
    assert done.stdout.splitlines()[0] == f"{made}: 2 of 2 layers converted, method hedgehog"
    assert [line.split(":")[0] for line in done.stdout.splitlines()[1:]] == ["distillation", "tuning"]
    assert linearize.load(made).linearization.config.window_size == 8
    assert invoke("generate", made, "--prompt", "abc", "--max-new-tokens", 3).exit_code == ExitCode.OK
