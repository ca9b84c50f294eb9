# SPDX-License-Identifier: Apache-2.0
"""A converted model in the native decode engine gives what torch gives, up to the rounding of the base model there."""

from __future__ import annotations

import pytest
import torch
from converted_models import tiny_model

from tilewright import linearize
from tilewright.linearize.checkpoint import LinearizedModel
from tilewright.linearize.engine import to_language_model
from tilewright.linearize.liger import LigerConfig
from tilewright.linearize.runner import Runner
from tilewright.models import LanguageModel
from tilewright.models.engine import Engine
from tilewright.models.language_model import expected_shapes

FORMS = {
    "gla": {},
    "window of 5": {"window_size": 5, "alpha": 0.3, "beta": 0.9},
    "normalized": {"normalize": True},
    "pool": {"pool": 4},
    "random gate": {"gate": "random", "pool": 8},
    "no gate": {"gate": "none"},
    "hgrn2": {"variant": "hgrn2", "pool": 4},
    "hgrn2 plain": {"variant": "hgrn2"},
    "no window": {"alpha": 1.0, "beta": 0.0},
    "window alone": {"alpha": 0.0, "beta": 1.0},
}


@pytest.fixture(scope="module")
def base():
    """Weights that bfloat16 holds exactly, so that only activations are rounded differently."""
    model = tiny_model(hidden_size=96, head_dim=16, tie_word_embeddings=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (50,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def rounding(base, ids):
    """Error of the engine on the softmax model: what rounding of activations does without any conversion."""
    config = to_language_model(_loaded(base, {"alpha": 0.0, "beta": 1.0, "window_size": 100})).config
    model = LanguageModel(config, {name: base.state_dict()[name] for name in expected_shapes(config)})
    return float((Engine(model, 128).logits(ids) - Runner(base, 128).logits(ids)).abs().max())


def _loaded(base, settings, **options):
    return LinearizedModel(linearize.convert(base, "liger", LigerConfig(**settings), **options))


@pytest.mark.parametrize("form", FORMS)
def test_the_engine_gives_the_logits_of_torch(base, ids, rounding, form):
    loaded = _loaded(base, FORMS[form], keep=[1])
    engine = Engine(to_language_model(loaded), 128)
    error = float((engine.logits(ids) - Runner(loaded.model, 128).logits(ids)).abs().max())
    # recurrence and softmax each round as often as attention does, and their errors may add up
    assert error <= 4 * rounding


def test_another_gate_would_be_noticed(base, ids, rounding):
    one, other = (Runner(_loaded(base, {"gate": gate}).model, 128).logits(ids) for gate in ("key", "none"))
    assert float((one - other).abs().max()) > 8 * rounding


def test_generation_needs_no_more_memory_for_more_tokens(base):
    model = to_language_model(_loaded(base, {}))
    sizes = [Engine(model, length).state_nbytes for length in (128, 512)]
    # what is left to grow is the engine's book-keeping of tokens
    assert sizes[1] - sizes[0] < 512 * 64
    assert list(Engine(model, 128).generate([5, 6, 7], max_new_tokens=4, stop_tokens=()))


def test_what_the_engine_cannot_run_is_named(base):
    with pytest.raises(ValueError, match=r"layer 0, LigerAttention\(variant=gsa"):
        to_language_model(_loaded(base, {"variant": "gsa"}))
    with pytest.raises(ValueError, match="qwen3"):
        to_language_model(_loaded(tiny_model("Qwen3"), {}))
