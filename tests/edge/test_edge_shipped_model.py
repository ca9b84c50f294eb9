# SPDX-License-Identifier: Apache-2.0
"""The ternary model in the package, through an image: the CPU's engine and both simulations write the same tokens."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tilewright import _host
from tilewright.cli.app import app
from tilewright.data import ternary_model
from tilewright.models import load
from tilewright.models.engine import Engine

PROMPT = "The great whale had been seen by all of the men on the deck of the ship, and the captain said that"
TOKENS = 32


def command(*words: str) -> str:
    done = CliRunner().invoke(app, ["edge", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("image") / "ternary.img"
    command("compile", "ternary", "-o", str(path))
    return str(path)


@pytest.fixture(scope="module")
def engines_tokens() -> list[int]:
    model = load(ternary_model())
    ids = [int(i) for i in model.tokenizer.encode(PROMPT)]
    assert len(ids) >= 16
    return list(Engine(model, 128).generate(ids, max_new_tokens=TOKENS, stop_tokens=()))


@pytest.mark.parametrize("engine", ["python", "hls", "rtl"])
def test_a_simulation_writes_the_engines_tokens(image, engines_tokens, engine):
    if engine == "rtl" and not hasattr(_host, "Accelerator"):
        pytest.skip("built without Verilator")
    words = ["--tokenizer", "ternary", "--engine", engine, "--tokens", str(TOKENS), "--prompt", PROMPT, "--json"]
    found = json.loads(command("simulate", image, *words))
    assert found["tokens"] == engines_tokens
    assert len(engines_tokens) == TOKENS
    assert found["status"] == 0
    if engine == "rtl":
        # The spec's bound: 2 % of the model and the pipelines' depth, here of one layer.
        assert abs(found["cycles"] - found["cycles_of_the_model"]) < 0.02 * found["cycles_of_the_model"] + 64
