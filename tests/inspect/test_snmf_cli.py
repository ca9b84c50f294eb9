# SPDX-License-Identifier: Apache-2.0
"""`tw snmf` on the real model: fit, inspect, steer, tree; its errors without one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from tilewright.cli.app import app
from tilewright.inspect.snmf import HierarchicalSemiNMF, SemiNMF, feature_set, save_features
from tilewright.inspect.snmf.cli import texts_of


def run(*words):
    return CliRunner().invoke(app, ["snmf", *map(str, words)])


def test_tree_of_a_stored_file(tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 12))
    model = HierarchicalSemiNMF((5, 2), sparsity=0.5, max_iter=10).fit(x)
    save_features(tmp_path / "tree", feature_set(model))
    done = run("tree", tmp_path / "tree", "--min-weight", 0.4, "--json")
    assert done.exit_code == 0
    found = [(e["level"], e["parent"], e["child"]) for e in json.loads(done.stdout)]
    assert found == [(e.level, e.parent, e.child) for e in model.tree(0.4)]
    assert "level 2, feature 0:" in run("tree", tmp_path / "tree").stdout


def test_errors_name_the_way_out(tmp_path):
    save_features(tmp_path / "flat", feature_set(SemiNMF(2, max_iter=2).fit(np.ones((4, 3)))))
    assert run("tree", tmp_path / "flat").exit_code == 2
    assert run("tree", tmp_path / "none").exit_code == 2
    assert run("inspect", tmp_path / "nomodel", tmp_path / "flat").exit_code == 2


def test_texts_by_name_and_file(tmp_path):
    assert len(texts_of("concepts", 400)) == 200
    assert len(texts_of("speeches", 7)) == 7
    (tmp_path / "mine").write_text("one\n\n two \n")
    assert texts_of(str(tmp_path / "mine"), 5) == ["one", "two"]
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="no text"):
        texts_of(str(tmp_path / "empty"), 5)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_models_features_are_fitted_read_and_steered(smollm2_gguf, tmp_path):
    file = tmp_path / "features.safetensors"
    texts = tmp_path / "texts"
    texts.write_text("\n".join(texts_of("concepts", 400)[::4]))
    fitted = run("fit", smollm2_gguf, "-o", file, "--text", texts, "-k", 12, "--upper", 4, "--sweeps", 40, "--json")
    assert fitted.exit_code == 0, fitted.output
    facts = json.loads(fitted.stdout)
    assert facts["neurons"] == 1536
    assert 0 < facts["relative_error"] < 1
    listed = run("inspect", smollm2_gguf, file)
    assert listed.exit_code == 0
    assert len(listed.stdout.splitlines()) == 12
    one = json.loads(run("inspect", smollm2_gguf, file, "--feature", 2, "--top", 3, "--json").stdout)[0]
    assert len(one["raised"]) == len(one["neurons"]) == 3
    assert run("tree", file).exit_code == 0
    steered = run("steer", smollm2_gguf, file, "--feature", 2, "--tokens", 4, "--kl", 0.1, "--json")
    assert steered.exit_code == 0, steered.output
    assert json.loads(steered.stdout)["kl"] == pytest.approx(0.1, rel=0.051)
    assert run("steer", smollm2_gguf, file, "--feature", 12).exit_code == 2
