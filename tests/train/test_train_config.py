# SPDX-License-Identifier: Apache-2.0
"""Settings: round trips, refusals, and the learning rate of each step."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from tilewright.train import TrainConfig


def test_settings_survive_json():
    config = TrainConfig(steps=10, betas=(0.8, 0.99), clip=None, evaluate_every=3, schedule="plateau")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig.from_dict({"steps": 4}) == TrainConfig(steps=4)


def test_unknown_and_missing_settings_are_named():
    with pytest.raises(ValueError, match=r"unknown training setting stepps; known: .*steps"):
        TrainConfig.from_dict({"stepps": 3})
    with pytest.raises(ValueError, match="steps"):
        TrainConfig.from_dict({"lr": 0.1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "schedule='cosin'"),
        ({"steps": -1}, "steps=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"warmup": 11}, "warmup=11"),
        ({"final_lr": 1.5}, "final_lr=1.5"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"plateau_factor": 1.0}, "plateau_factor=1.0"),
        ({"patience": 3}, "evaluate_every=None"),
        ({"schedule": "plateau"}, "evaluate_every=None"),
        ({"keep_best": True}, "evaluate_every=None"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 10, **settings})


def test_warm_up_rises_linearly_to_the_peak():
    config = TrainConfig(steps=20, lr=0.4, warmup=4, schedule="constant")
    assert [config.lr_at(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4], rel=1e-15)


def test_cosine_and_linear_fall_from_the_peak_to_the_final_share():
    cosine = TrainConfig(steps=13, lr=2.0, warmup=2, final_lr=0.25)
    linear = TrainConfig(steps=13, lr=2.0, warmup=2, final_lr=0.25, schedule="linear")
    for config in (cosine, linear):
        rates = [config.lr_at(step) for step in range(2, 13)]
        assert rates[0] == 2.0
        assert rates[-1] == pytest.approx(0.5, rel=1e-15)
        assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert cosine.lr_at(7) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 2)), rel=1e-15)
    assert linear.lr_at(7) == pytest.approx(0.5 + 1.5 * 0.5, rel=1e-15)
