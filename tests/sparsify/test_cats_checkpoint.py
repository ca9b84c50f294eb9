# SPDX-License-Identifier: Apache-2.0
"""Thresholds in checkpoints, and the verbs of the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tilewright.cli.app import app
from tilewright.models import CheckpointError, LanguageModel, LlamaConfig, load, save, to_transformers
from tilewright.models.engine import Engine
from tilewright.models.language_model import Weight, expected_shapes, threshold_name
from tilewright.sparsify import method, methods
from tilewright.sparsify.cats import CATSConfig, Thresholds, model_thresholds, sparsify_model, with_thresholds

VOCABULARY = 64


def small() -> LanguageModel:
    config = LlamaConfig("llama", VOCABULARY, 32, 64, 2, 4, 2, 8, 256, tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(2)
    weights: dict[str, Weight] = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator) * 0.3
        weights[name] = values + 1 if "norm" in name else values
    return LanguageModel(config, weights, source="small")


def data() -> list[torch.Tensor]:
    return [torch.randint(0, VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(9))]


def test_a_checkpoint_carries_its_thresholds(tmp_path: Path) -> None:
    made = sparsify_model(small(), CATSConfig(0.5), data())
    assert not small().has_thresholds
    back = load(save(made, tmp_path / "sparse"))
    assert back.has_thresholds
    assert back.settings["sparsity"]["config"] == CATSConfig(0.5).to_dict()
    found = model_thresholds(back)
    assert {name: float(value) for name, value in found.items()} == {
        name: float(value) for name, value in model_thresholds(made).items()
    }
    ids = data()[0][0, :20].tolist()
    assert torch.equal(Engine(back, 64).logits(ids), Engine(made, 64).logits(ids))
    assert not torch.equal(Engine(small(), 64).logits(ids), Engine(made, 64).logits(ids))


def test_one_threshold_a_neuron(tmp_path: Path) -> None:
    made = sparsify_model(small(), CATSConfig(0.5, ranking="norm"), data())
    back = load(save(made, tmp_path / "sparse"))
    assert model_thresholds(back)["model.layers.0.mlp"].shape == (64,)
    mlp: Any = to_transformers(back).model.layers[0].mlp
    assert torch.equal(mlp.threshold, model_thresholds(made)["model.layers.0.mlp"])


def test_infinite_thresholds_become_finite() -> None:
    made = with_thresholds(small(), Thresholds({"model.layers.1.mlp": torch.tensor(float("inf"))}))
    assert float(made.dense(threshold_name(1))) == torch.finfo(torch.float32).max


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = small()
    made = with_thresholds(model, Thresholds({"model.layers.1.mlp": torch.tensor(0.1)}))
    with pytest.raises(ValueError, match="already"):
        with_thresholds(made, Thresholds({}))
    with pytest.raises(ValueError, match="no layer"):
        with_thresholds(model, Thresholds({"model.layers.7.mlp": torch.tensor(0.1)}))
    with pytest.raises(ValueError, match="64 are needed"):
        with_thresholds(model, Thresholds({"model.layers.1.mlp": torch.ones(9)}))
    with pytest.raises(ValueError, match="'hidden'"):
        with_thresholds(model, Thresholds({}, "hidden"))
    with pytest.raises(ValueError, match="calibration"):
        sparsify_model(model)
    for bad, message in ((torch.ones(2, 3), r"\[1\] or \[64\]"), (torch.tensor([-1.0]), "negative")):
        wrong = dataclasses.replace(model, weights={**model.weights, threshold_name(0): bad})
        with pytest.raises(CheckpointError, match=message):
            save(wrong, tmp_path / "wrong")


def test_methods_and_settings() -> None:
    assert "cats" in methods()
    with pytest.raises(ValueError, match="did you mean cats"):
        method("cat")
    assert CATSConfig.from_dict(CATSConfig(0.3, "norm", "exact").to_dict()) == CATSConfig(0.3, "norm", "exact")
    for bad, message in (
        ({"sparsity": 1.0}, "below 1"),
        ({"ranking": "output"}, "ranking"),
        ({"method": "some"}, "method"),
        ({"share": 0.5}, "no setting 'share'"),
    ):
        with pytest.raises(ValueError, match=message):
            CATSConfig.from_dict(bad)


def run(*words: str) -> Any:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.model
def test_the_command_line_on_smollm2(tmp_path: Path, smollm2_gguf: Path) -> None:
    place, text = str(tmp_path / "sparse"), ("--batches", "1", "--length", "128")
    run("sparsify", str(smollm2_gguf), "--method", "cats", "--sparsity", "0.5", "-o", place, *text)
    options = ("--max-tokens", "128", "--window", "128", "--json")
    sparse, dense = (
        json.loads(run("eval", model, *options).stdout)["perplexity"] for model in (place, str(smollm2_gguf))
    )
    assert dense < sparse < 3 * dense
    reply = json.loads(run("generate", place, "-p", "The Union is", "--max-new-tokens", "8", "--json").stdout)
    assert reply["new_tokens"] == 8
    thresholds = str(tmp_path / "t.json")
    run("cats", "calibrate", str(smollm2_gguf), "-o", thresholds, *text)
    found = json.loads(
        run("cats", "eval", str(smollm2_gguf), "--thresholds", thresholds, "--tokens", "128", "--json").stdout
    )
    assert 1 < found["ratio"] < 3
    assert 0.4 < sum(found["sparsity"].values()) / 30 < 0.6
    run("cats", "bench", "--hidden", "64", "--inner", "128", "--repeats", "2")
