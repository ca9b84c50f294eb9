# SPDX-License-Identifier: Apache-2.0
"""Thresholds as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.sparsify.thresholds import Thresholds, load_thresholds, save_thresholds

VALUES = {
    "model.layers.0.mlp": torch.tensor(0.1),
    "model.layers.1.mlp": torch.tensor([0.0, 1e-30, 0.3, float("inf")]),
}


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
@pytest.mark.parametrize("score", ["gate", "hidden"])
def test_files_restore_every_bit(tmp_path: Path, ending: str, score: Any) -> None:
    made = Thresholds(VALUES, score, {"sparsity": 0.5})
    found = load_thresholds(save_thresholds(made, tmp_path / f"t{ending}"))
    assert (found.score, found.about, list(found)) == (score, {"sparsity": 0.5}, list(VALUES))
    for name, value in VALUES.items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)


def test_the_json_form_is_the_documented_one(tmp_path: Path) -> None:
    path = save_thresholds(
        Thresholds({"a": torch.tensor(0.5), "b": torch.tensor([1.0, float("inf")])}), tmp_path / "t.json"
    )
    assert json.loads(path.read_text()) == {
        "format": "tilewright-thresholds", "version": 1, "score": "gate", "about": {},
        "thresholds": {"a": 0.5, "b": [1.0, "inf"]},
    }  # fmt: skip


@pytest.mark.parametrize("bad", [torch.tensor(-1.0), torch.tensor(float("nan")), torch.zeros(2, 2), torch.zeros(0)])
def test_bad_thresholds_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"layer\.7"):
        Thresholds({"layer.7": bad})


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="score"):
        Thresholds({}, "size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ending"):
        save_thresholds(Thresholds(VALUES), tmp_path / "t.txt")
    path = tmp_path / "t.json"
    good = {"format": "tilewright-thresholds", "version": 1, "score": "gate", "about": {}, "thresholds": {"a": 0.5}}
    for change, message in (
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "is not a"),
        ({"extra": 1}, "keys"),
        ({"about": 3}, "about"),
        ({"score": "size"}, "score"),
        ({"thresholds": {"a": "much"}}, "'a'"),
        ({"thresholds": {"a": -1}}, "negative"),
        ({"thresholds": {"a": True}}, "'a'"),
        ({"thresholds": [1]}, "no object"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            load_thresholds(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        load_thresholds(path)
    (tmp_path / "t.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        load_thresholds(tmp_path / "t.safetensors")
