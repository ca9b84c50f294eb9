# SPDX-License-Identifier: Apache-2.0
"""`--set` pairs and the calibration text of `tw quantize`."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tilewright.cli.app import app
from tilewright.cli.codes import ExitCode
from tilewright.cli.quantize import parse_settings


def test_values_are_json_where_they_read_as_json():
    pairs = ["group_size=64", "pre_rope=false", "weights=keep", "search=[0, 0.5]", "scale_dtype=float32", "x=a=b"]
    assert parse_settings(pairs) == {
        "group_size": 64,
        "pre_rope": False,
        "weights": "keep",
        "search": [0, 0.5],
        "scale_dtype": "float32",
        "x": "a=b",
    }


@pytest.mark.parametrize("pair", ["group_size", "=64", ""])
def test_a_pair_without_key_or_value_is_refused(pair):
    with pytest.raises(ValueError, match="write KEY=VALUE"):
        parse_settings([pair])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--method", "firq"], "did you mean fireq"),
        (["--set", "grup_size=64"], "did you mean 'group_size'"),
        (["--method", "rtn", "--set", "group_size=20"], "multiple of 16"),
    ],
)
def test_wrong_settings_are_named_before_the_model_is_loaded(arguments, part, tmp_path):
    result = CliRunner().invoke(app, ["quantize", str(tmp_path / "none"), "-o", str(tmp_path / "out"), *arguments])
    assert result.exit_code == ExitCode.BAD_INPUT
    assert part in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_refused_before_the_work(tmp_path):
    model, output = tmp_path / "model.gguf", tmp_path / "out"
    model.write_bytes(b"GGUF")
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    result = CliRunner().invoke(app, ["quantize", str(model), "-o", str(output), "--method", "rtn"])
    assert result.exit_code == ExitCode.BAD_INPUT
    assert "thesis.txt" in result.stderr
