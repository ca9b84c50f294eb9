# SPDX-License-Identifier: Apache-2.0
"""The verbs: help, options that every one has, wrong use."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tilewright.cli.app import VERBS, app
from tilewright.cli.codes import ExitCode

RUN = CliRunner(env={"COLUMNS": "200"})


def invoke(*arguments: str, **kwargs):
    return RUN.invoke(app, list(arguments), **kwargs)


def test_help_names_every_verb_and_the_exit_codes():
    result = invoke("--help")
    assert result.exit_code == ExitCode.OK
    assert all(verb in result.stdout for verb in VERBS)
    assert "Exit codes" in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb):
    result = invoke(verb, "--help")
    assert result.exit_code == ExitCode.OK
    assert "--json" in result.stdout


def test_help_imports_no_heavy_module():
    code = (
        "import sys\nfrom tilewright.cli.app import app\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib', 'rich.table') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_runs_like_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "tilewright.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == invoke("--version").stdout
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-verb"],
        ["generate"],
        ["generate", "x", "--no-such-option"],
        ["generate", "x", "--prompt", "a", "--max-new-tokens", "0"],
        ["quantize", "x"],
        ["eval", "x", "--window", "1"],
    ],
    ids=lambda a: " ".join(a),
)
def test_wrong_use_is_exit_code_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "Traceback" not in result.output


@pytest.mark.parametrize("verb", ["generate", "eval", "chat"])
def test_an_absent_model_is_named_with_the_way_out(verb, tmp_path):
    extra = ["--prompt", "a"] if verb == "generate" else []
    result = invoke(verb, str(tmp_path / "none.gguf"), *extra)
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "none.gguf: no such file or folder" in result.stderr
    assert "tw fetch" in result.stderr


@pytest.mark.parametrize("option", ["--act", "--kv", "--device"])
def test_a_wrong_format_lists_the_right_ones(option, tmp_path):
    result = invoke("generate", str(tmp_path), "--prompt", "a", option, "int3")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert f"{option} int3: choose" in result.stderr


def test_a_prompt_must_be_given_exactly_once(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("hello")
    for arguments in ([], ["--prompt", "a", "--prompt-file", str(path)]):
        result = invoke("generate", str(tmp_path), *arguments)
        assert result.exit_code == ExitCode.BAD_INPUT
        assert "give the prompt once" in result.stderr


@pytest.mark.parametrize("way", ["option", "file", "standard input"])
def test_a_prompt_that_is_not_utf8_is_refused_before_the_model_is_loaded(way, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"caf\xe9")
    arguments = {"option": ["--prompt", "caf\udce9"], "file": ["--prompt-file", str(path)]}.get(way, ["--prompt", "-"])
    result = invoke("generate", str(tmp_path / "no-model"), *arguments, input=b"caf\xe9")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "not valid UTF-8" in result.stderr
    assert "3" in result.stderr


def test_a_stop_text_that_is_not_utf8_is_refused(tmp_path):
    result = invoke("generate", str(tmp_path), "--prompt", "a", "--stop", "\udcff")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "--stop is not valid UTF-8" in result.stderr


def test_fetch_knows_what_it_can_fetch():
    result = invoke("fetch", "gpt")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "smollm2, encyclopedia" in result.stderr


def test_fetch_says_where_a_present_model_is(monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setenv("TILEWRIGHT_SMOLLM2", str(path))
    assert json.loads(invoke("fetch", "--json").stdout) == {"smollm2": str(path)}


def test_bench_lists_its_cases():
    done = subprocess.run(
        [sys.executable, "-m", "tilewright.cli", "bench", "--list", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [case["name"] for case in json.loads(done.stdout)]
    assert "gemv-11008x4096" in names
    assert len(names) == len(set(names))


def test_bench_outside_a_checkout_says_where_benches_live(monkeypatch, tmp_path):
    from tilewright.cli import bench

    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c" / "d" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    result = invoke("bench", "--list")
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "source checkout" in result.stderr
