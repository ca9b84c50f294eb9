# SPDX-License-Identifier: Apache-2.0
"""Workers run in a process of their own, in the environment that has their packages, and fail with their last words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tilewright.measure import launch
from tilewright.measure.protocol import Spec


@pytest.fixture
def no_peers(monkeypatch, tmp_path):
    """No environment but this one, and no peer in it."""
    monkeypatch.setenv(launch.PEERS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(launch, "installed", lambda *_: frozenset())


def test_packages_are_looked_for_without_importing_them():
    assert launch.installed(Path(sys.executable), ("numpy", "no_such_package")) == {"numpy"}


def test_named_environments_come_before_this_one(monkeypatch, tmp_path):
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setenv(launch.PEERS_VARIABLE, f"{tmp_path / 'absent'}:{tmp_path / 'env'}")
    assert launch.peer_environments() == [python, Path(sys.executable)]


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize("runner", launch.PACKAGES)
def test_an_absent_runner_says_how_to_get_it(runner):
    reason = launch.why_absent(runner)
    assert reason is not None
    assert ("make peers" in reason) == (runner not in launch.OWN)
    with pytest.raises(ModuleNotFoundError, match=reason[:10]):
        launch.run(Spec(runner, "model.gguf", 1))


def test_a_failing_worker_gives_its_last_line(tmp_path):
    with pytest.raises(launch.MeasureError, match=r"none\.gguf: no such file"):
        launch.run(Spec("tilewright", str(tmp_path / "none.gguf"), 1))


@pytest.mark.model
@pytest.mark.parametrize("runner", ["tilewright", "llama.cpp", "ik_llama.cpp"])
def test_a_worker_measures_the_real_model(runner, smollm2_gguf):
    reason = launch.why_absent(runner)
    if reason:
        pytest.skip(reason)
    ids = list(range(1000, 1032))
    spec = Spec(
        runner, str(smollm2_gguf), 1, {"ids": [ids]}, ids[:8], decode=2, prompts=[ids[:4]], new_tokens=2, stop_ids=[2]
    )
    found = launch.run(spec)
    assert found["perplexity"]["ids"] > 1
    assert 0 < found["bytes"] <= 1.02 * smollm2_gguf.stat().st_size
    assert 5 < found["bits_per_weight"] < 6.5
    assert found["resident_growth_bytes"] > 0
    assert len(found["generated"][0]) <= 2
