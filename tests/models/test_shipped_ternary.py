# SPDX-License-Identifier: Apache-2.0
"""The ternary model in the package: whole, small, the same tokens on both paths, and English words."""

from __future__ import annotations

import re

import pytest
import torch

from tilewright.data import corpus, ternary_model
from tilewright.formats import PackedTernary
from tilewright.models import LanguageModel, load, to_transformers
from tilewright.models.engine import Engine, SamplingConfig
from tilewright.models.language_model import linear_names

PROMPT = "The great whale had been seen by all of the men on the deck of the ship, and the captain said that"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load(ternary_model())


def test_it_is_small_and_ternary(model: LanguageModel) -> None:
    assert sum(path.stat().st_size for path in ternary_model().iterdir()) < 4_000_000
    for name in linear_names(model.config):
        weight = model.weights[name]
        assert isinstance(weight, PackedTernary)
        share = weight.unpack().bool().float().mean()
        assert 0.3 < float(share) < 0.95, f"{name} is not a trained ternary matrix"
    assert model.config.has_sub_norms


def test_engine_and_operators_give_the_same_tokens(model: LanguageModel) -> None:
    ids = [int(i) for i in model.tokenizer(PROMPT)["input_ids"]]
    assert len(ids) >= 16
    tokens = list(Engine(model, 128).generate(ids, max_new_tokens=32, stop_tokens=()))
    theirs = to_transformers(model)
    with torch.no_grad():
        plain = theirs.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
    assert tokens == plain[0, len(ids) :].tolist()
    assert len(tokens) == 32


def test_it_writes_english_words(model: LanguageModel) -> None:
    """Of what it writes, most words are words of the shipped texts; of random tokens, few."""
    known = set(re.findall(r"[a-z]+", " ".join(corpus(n, p) for n in ("moby-dick", "speeches")
                                               for p in ("calibration", "evaluation")).lower()))  # fmt: skip
    engine = Engine(model, 192)
    ids = [int(i) for i in model.tokenizer(PROMPT)["input_ids"]]

    def share(tokens: list[int]) -> float:
        words = re.findall(r"[a-z]+", model.tokenizer.decode(tokens).lower())
        return sum(word in known for word in words) / len(words)

    sampling = SamplingConfig(temperature=0.7, top_p=0.95, seed=1)
    written = list(engine.generate(ids, sampling, max_new_tokens=120, stop_tokens=()))
    random = torch.randint(0, model.config.vocab_size, (120,)).tolist()
    assert share(written) > 0.85 > 0.6 > share(random)
