# SPDX-License-Identifier: Apache-2.0
"""quantize, generate, eval and chat on the real checkpoint, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tilewright import data, evaluate, models
from tilewright.cli.app import app
from tilewright.cli.codes import ExitCode
from tilewright.models.engine import Engine

pytestmark = pytest.mark.model
PROMPT = "The capital of France is"


def invoke(*arguments: str, **kwargs):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **kwargs)


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf, tmp_path_factory) -> Path:
    """The model's own weights with INT8 activations and a bfloat16 cache, saved by `tw quantize`."""
    folder = tmp_path_factory.mktemp("quantized") / "kept"
    settings = ["--set", "weights=keep", "--set", "activations=int8", "--set", "kv_bits=16", "--batches", "1"]
    result = invoke("quantize", smollm2_gguf, "--method", "rtn", "-o", folder, *settings, "--json")
    assert result.exit_code == ExitCode.OK, result.stderr
    report = json.loads(result.stdout)
    assert report["bytes"] == report["bytes_before"]
    return folder


def test_the_saved_checkpoint_generates_the_same_text_as_its_source(smollm2_gguf, checkpoint):
    common = ["--prompt", PROMPT, "--max-new-tokens", "6", "--json"]
    source = invoke("generate", smollm2_gguf, *common, "--act", "int8", "--kv", "bf16")
    saved = invoke("generate", checkpoint, *common)
    assert json.loads(saved.stdout)["text"] == json.loads(source.stdout)["text"]
    assert json.loads(saved.stdout)["new_tokens"] == 6


def test_streamed_text_is_the_text_of_the_json(checkpoint):
    common = ["--prompt", PROMPT, "--max-new-tokens", "5"]
    text = json.loads(invoke("generate", checkpoint, *common, "--json").stdout)["text"]
    streamed = invoke("generate", checkpoint, *common)
    assert streamed.stdout == text + "\n"
    assert streamed.stderr == ""


def test_a_prompt_from_standard_input_is_that_of_the_option(checkpoint):
    common = ["generate", checkpoint, "--max-new-tokens", "3"]
    piped = invoke(*common, "--prompt", "-", input=PROMPT.encode())
    assert piped.stdout == invoke(*common, "--prompt", PROMPT).stdout


def test_sampling_follows_the_seed(checkpoint):
    common = ["generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", "8", "--temperature", "1.5"]
    first, again, other = (invoke(*common, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_a_context_too_short_is_said_with_the_numbers(checkpoint):
    result = invoke("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", "20", "--context", "8")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "context of 8" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("option", "value"), [("--temperature", "-1"), ("--top-p", "0"), ("--top-k", "-3")])
def test_sampling_out_of_range_is_refused_before_loading(option, value, tmp_path):
    result = invoke("generate", tmp_path / "none", "--prompt", "a", option, value)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert option.strip("-").replace("-", "_") in result.stderr


def test_eval_is_the_perplexity_of_the_engine_in_the_chosen_formats(checkpoint):
    common = ["--text", "moby-dick", "--max-tokens", "65", "--window", "64", "--stride", "32", "--json"]
    result = json.loads(invoke("eval", checkpoint, *common, "--act", "fp8", "--kv", "int4").stdout)
    model = models.load(checkpoint)
    tokens = evaluate.tokenize(model.tokenizer, data.corpus("moby-dick", "evaluation"), max_tokens=65)
    engine = Engine(model, max_length=64, act="fp8", kv_bits=4)
    expected = evaluate.perplexity(engine.logits, tokens, window=64, stride=32)
    assert result["perplexity"] == expected.perplexity
    assert (result["tokens"], result["truncated"]) == (64, True)


def test_eval_refuses_a_text_that_is_not_utf8(checkpoint, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc\xff")
    result = invoke("eval", checkpoint, "--text", path)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "byte 3" in result.stderr


def test_chat_answers_line_by_line_and_obeys_its_commands(checkpoint):
    lines = "Say hello.\n/reset\n/unknown\nSay hello.\n/quit\nnever asked\n"
    result = invoke("chat", checkpoint, "--max-new-tokens", "4", "--temperature", "0", "--json", input=lines)
    assert result.exit_code == ExitCode.OK
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["question"] for answer in answers] == ["Say hello.", "Say hello."]
    assert answers[0]["text"] == answers[1]["text"] != ""
    assert "/unknown is no command" in result.stderr


def test_a_damaged_checkpoint_is_one_line(smollm2_gguf, tmp_path):
    path = tmp_path / "cut.gguf"
    with smollm2_gguf.open("rb") as whole:
        path.write_bytes(whole.read(5000))
    result = invoke("generate", path, "--prompt", "a")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert result.stderr.startswith("tw: cut.gguf")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_gpu_that_is_not_there_is_said_plainly(smollm2_gguf):
    result = invoke("generate", smollm2_gguf, "--prompt", "a", "--device", "cuda")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "no CUDA device can be used here" in result.stderr
