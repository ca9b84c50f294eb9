# SPDX-License-Identifier: Apache-2.0
"""`tw sae`: train, analyse, pursuit on the real model."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tilewright.cli.app import app
from tilewright.inspect.sae import TopKSAE, load_sae, save_sae
from tilewright.inspect.sae.cli import described

run = CliRunner()


def test_a_report_has_a_line_for_each_quantity():
    report = {
        "sae": "s",
        "site": "a.b",
        "tokens": 1234,
        "fvu": {"sae": 0.2, "nonlinear": 0.12, "linear": 0.08, "normalized_mse": 0.1, "l0": 32.0},
        "r2": {"r2_global": 0.4, "r2_dim_mean": 0.5, "shuffled": -0.1, "shrinkage": 1.02, "r2_rescaled": 0.39},
        "squared_norm_r2": {"x": 0.9},
        "baselines": {"L0": 0.1},
        "downstream": {"loss": {"original": 3.0}, "recovered": {"linear": 0.45}, "tokens": 100},
    }
    text = "\n".join(described(report))
    assert "1,234 tokens" in text
    assert "0.2000 = linear 0.0800 + nonlinear 0.1200" in text
    assert "linear 45 %" in text


def test_an_sae_that_does_not_say_where_it_belongs(tmp_path):
    save_sae(TopKSAE(6, 40, 3), tmp_path / "sae")
    done = run.invoke(app, ["sae", "pursuit", str(tmp_path / "sae")])
    assert done.exit_code == 2
    assert "--site" in done.output


@pytest.mark.model
@pytest.mark.slow
def test_train_analyse_and_pursue(smollm2_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_SMOLLM2", str(smollm2_gguf))
    folder, store = str(tmp_path / "sae"), str(tmp_path / "store")
    words = [
        "--site",
        "model.layers.1",
        "--width",
        "600",
        "--k",
        "16",
        "--steps",
        "20",
        "--batch",
        "128",
        "--lr",
        "1e-3",
    ]
    words += ["--text", "speeches", "--tokens", "600", "--length", "128", "--store", store, "--json"]
    first = run.invoke(app, ["sae", "train", "smollm2", "-o", folder, *words])
    assert first.exit_code == 0, first.output
    report = json.loads(first.output)
    assert report["rows"] == 4 * 108
    assert report["l0"] <= 16
    sae = load_sae(folder)
    assert sae.metadata["hook_name"] == "model.layers.1"
    again = run.invoke(app, ["sae", "train", "smollm2", "-o", folder, *words])
    assert json.loads(again.output)["fvu"] == report["fvu"]
    few = run.invoke(app, ["sae", "analyse", folder, "--tokens", "600", "--length", "128"])
    assert few.exit_code == 2
    assert "at least 2880" in few.output
    done = run.invoke(app, ["sae", "pursuit", folder, "--tokens", "256", "--length", "128", "--json"])
    assert done.exit_code == 0, done.output
    assert 0 < json.loads(done.output)["fvu"]["pursuit"] < json.loads(done.output)["fvu"]["sae"]
