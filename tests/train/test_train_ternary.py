# SPDX-License-Identifier: Apache-2.0
"""Ternary runs: resumed runs repeat themselves, the packed model is the trained one, texts and tokenizers by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tilewright.cli.app import app
from tilewright.data.bytes import held_out_windows
from tilewright.formats import PackedTernary
from tilewright.models import load
from tilewright.models.engine import Engine
from tilewright.train import TrainConfig, Trainer
from tilewright.train.ternary import MODEL, RUN, TernaryRun, bits_per_byte, build, train_ternary
from tilewright.train.texts import bpe_tokenizer, encode, token_lengths, tokenizer_of
from tilewright.train.trainer import CHECKPOINT, LOG

TEXT = (
    "The whale swam on. The whale, the great white whale, swam on and on through the sea; and the men rowed after it.\n"
)


def small_run(tmp_path: Path, **changes: Any) -> TernaryRun:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 60)
    training = TrainConfig(steps=6, lr=3e-3, schedule="wsd", warmup=2, final_lr=0.0, evaluate_every=3, save_every=2)
    values: dict[str, Any] = {
        "training": training, "text": (str(text),), "tokenizer": "bytes", "layers": 2, "width": 32, "inner": 64,
        "heads": 2, "kv_heads": 1, "context": 64, "batch": 2, "length": 32, "evaluation_windows": 3,
    }  # fmt: skip
    return TernaryRun(**(values | changes))


def log_of(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def test_a_run_leaves_a_packed_model_that_is_the_trained_one(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    report = train_ternary(run, tmp_path / "out")
    assert report["steps"] == 6
    assert report["tokens_seen"] == 6 * 2 * 32
    model = load(tmp_path / "out" / MODEL)
    assert model.config.model_type == "bitnet"
    linears = [w for w in model.weights.values() if isinstance(w, PackedTernary)]
    assert len(linears) == 14
    assert {w.format for w in linears} == {"t5"}
    # The latent model of the checkpoint, in training form, against the packed one on the engine's operators.
    content = torch.load(tmp_path / "out" / CHECKPOINT, weights_only=True)
    latent = build(run, 256)
    latent.load_state_dict(content["model"], strict=False)
    ids = torch.tensor([list(TEXT[:40].encode())])
    from tilewright.models import to_transformers

    with torch.no_grad():
        expected = latent.eval()(ids).logits
        got = to_transformers(model, kv_bits=16, query="float32")(ids).logits
    # The cache and the head are bfloat16 there: 2^-8 relative for each of the values that meet.
    assert float((got - expected).norm() / expected.norm()) < 0.05
    assert model.tokenizer.decode(model.tokenizer(TEXT)["input_ids"]) == TEXT
    tokens = list(Engine(model, 64).generate(ids[0, :16].tolist(), max_new_tokens=8))
    assert len(tokens) == 8


def test_a_resumed_run_repeats_itself(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    train_ternary(run, tmp_path / "whole")
    half = dataclasses.replace(run, training=dataclasses.replace(run.training, steps=6))

    class Stopped(Exception):
        pass

    original = Trainer._step

    def stop_at_four(self: Trainer, step: int) -> dict[str, Any]:
        if step == 4:
            raise Stopped
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", stop_at_four)
        with pytest.raises(Stopped):
            train_ternary(half, tmp_path / "parts")
    with pytest.raises(ValueError, match="holds a run already"):
        train_ternary(run, tmp_path / "parts")
    train_ternary(run, tmp_path / "parts", resume=True)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    one, other = load(tmp_path / "parts" / MODEL), load(tmp_path / "whole" / MODEL)
    for name, weight in one.weights.items():
        theirs = other.weights[name]
        if isinstance(weight, PackedTernary):
            assert isinstance(theirs, PackedTernary)
            assert torch.equal(weight.data, theirs.data)
        else:
            assert torch.equal(weight, theirs)  # type: ignore[arg-type]


def test_the_float_model_trains_in_the_same_way(tmp_path: Path) -> None:
    run = small_run(tmp_path, ternary=False)
    report = train_ternary(run, tmp_path / "out")
    assert not report["ternary"]
    model = load(tmp_path / "out" / MODEL)
    assert not any(isinstance(w, PackedTernary) for w in model.weights.values())
    assert report["parameters"] == sum(w.numel() for w in model.weights.values())  # type: ignore[union-attr]
    first = dict(build(run, 256).named_parameters())
    second = dict(build(dataclasses.replace(run, ternary=True), 256).named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bits_a_byte_count_bytes_not_tokens() -> None:
    """A model that says nothing costs log2 V bits a token; tokens of n bytes make it log2 V / n a byte."""
    tokenizer = bpe_tokenizer(TEXT * 50, 300)
    lengths = token_lengths(tokenizer)
    ids = encode(tokenizer, "bpe:300", TEXT * 20)
    assert int(lengths[ids].sum()) == len(TEXT) * 20
    windows = held_out_windows(ids, length=16, batch=2)

    class Uniform(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*x.shape, 300)

    scores = bits_per_byte(windows, lengths)(Uniform())
    count = sum(labels.numel() for _, labels in windows)
    size = sum(int(lengths[labels].sum()) for _, labels in windows)
    assert scores["loss"] == pytest.approx(math.log(300), rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(math.log2(300) * count / size, rel=1e-6)


def test_tokenizers_by_name() -> None:
    tokenizer = tokenizer_of("bpe:300", TEXT * 50)
    assert len(tokenizer) == 300
    for text in (TEXT, "naïve – Ünicode \U0001f40b \x00\x7f", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for name in ("bpe:12", "bpe:x", "bpe:-3"):
        with pytest.raises(ValueError, match="bpe:300"):
            tokenizer_of(name, TEXT)
    with pytest.raises(ValueError, match="the text gives"):
        tokenizer_of("bpe:5000", TEXT)


def test_the_schedule_stays_and_falls_and_may_be_lengthened() -> None:
    config = TrainConfig(steps=100, lr=1.0, schedule="wsd", warmup=10, final_lr=0.0, decay=0.2)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(rates[10:80]) == {1.0}
    falls = [a - b for a, b in itertools.pairwise(rates[79:])]
    assert falls == pytest.approx([1 / 21] * 20)
    longer = dataclasses.replace(config, steps=200)
    assert [longer.lr_at(step) for step in range(80)] == rates[:80]
    with pytest.raises(ValueError, match="decay=0"):
        TrainConfig(steps=10, decay=0)


def test_runs_are_described_by_files(tmp_path: Path) -> None:
    run = small_run(tmp_path, held_out=("speeches",))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run.to_dict()))
    assert TernaryRun.read(path) == run
    path.write_text('{"training": {"steps": 1}, "depth": 3}')
    with pytest.raises(ValueError, match="unknown setting depth"):
        TernaryRun.read(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        TernaryRun.read(path)


def test_a_held_out_text_is_never_trained_on(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely. " * 40)
    run = small_run(tmp_path, held_out=(str(other),))
    report = train_ternary(dataclasses.replace(run, training=TrainConfig(steps=1)), tmp_path / "out")
    assert report["tokens_of_text"] == len(TEXT) * 60
    too_short = tmp_path / "short.txt"
    too_short.write_text("x")
    with pytest.raises(ValueError, match="held-out text has 1 tokens"):
        train_ternary(small_run(tmp_path, held_out=(str(too_short),)), tmp_path / "no")


def test_the_verb_trains_resumes_and_reports(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 60)
    size = ["--layers", "1", "--width", "16", "--inner", "32", "--heads", "2", "--kv-heads", "1", "--context", "32"]
    size += ["--batch", "2", "--length", "16", "--tokenizer", "bytes", "--set", "evaluate_every=2"]
    output = str(tmp_path / "out")
    runner = CliRunner()
    made = runner.invoke(app, ["train-ternary", "-o", output, "--text", str(text), "--steps", "2", "--json", *size])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["steps"] == 2
    assert json.loads((tmp_path / "out" / RUN).read_text())["layers"] == 1
    again = runner.invoke(app, ["train-ternary", "-o", output, "--text", str(text), "--steps", "2", *size])
    assert again.exit_code == 2
    assert "holds a run already" in again.stderr
    more = runner.invoke(app, ["train-ternary", "-o", output, "--resume", "--steps", "3"])
    assert more.exit_code == 0, more.output
    assert "3 steps" in more.stdout
    said = runner.invoke(app, ["generate", str(tmp_path / "out" / MODEL), "--prompt", "The", "--max-new-tokens", "4"])
    assert said.exit_code == 0, said.output
    assert said.stdout.strip("\n")
