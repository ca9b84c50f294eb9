# SPDX-License-Identifier: Apache-2.0
"""The recipe of the recall claims: every competitor gets the same sequences and schedule, and a simple model learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tilewright.data.recall import (
    ANSWERS,
    BLANK,
    IGNORE,
    Curriculum,
    key_value_recall,
    keys_of,
    mix,
    multi_query_recall,
)
from tilewright.train.recall import HELD_OUT_SEED, RecallRecipe, train_recall


def test_pairs_grow_by_a_constant_factor_and_stay():
    data = Curriculum(pairs=32, steps=100, first=2, growing=0.5)
    # 2 * 16^(step / 50), to the nearest whole number
    assert [data.pairs_at(step) for step in (0, 12, 25, 37, 50, 51, 99)] == [2, 4, 8, 16, 32, 32, 32]
    grown = [data.pairs_at(step) for step in range(100)]
    assert grown == sorted(grown)
    assert Curriculum(pairs=5, steps=10, growing=0.0).pairs_at(0) == 5


def test_batches_hold_the_pairs_of_their_step_and_no_more_tokens_than_the_last():
    data = Curriculum(pairs=16, steps=20, batch=3, vocabulary=64, seed=4, widest=4)
    largest = 3 * 48
    for step in range(20):
        inputs, labels = data(step)
        pairs = data.pairs_at(step)
        assert inputs.shape == (3 * min(4, 16 // pairs), 3 * pairs)
        assert inputs.numel() <= largest
        assert ((labels != IGNORE).sum(1) == pairs).all()
        assert (inputs != BLANK).all()
    want = multi_query_recall(3, mix(4, 19), length=48, pairs=16, vocabulary=64)
    assert all(torch.equal(a, b) for a, b in zip(data(19), want, strict=True))


def test_pairs_of_one_token_need_two_tokens_each():
    data = Curriculum(pairs=6, steps=4, batch=2, vocabulary=45, task=key_value_recall, tokens=2)
    inputs, labels = data(3)
    assert keys_of(45) == 8
    assert inputs.shape == (2, 12)
    for row, asked in zip(inputs.tolist(), labels.tolist(), strict=True):
        pairs, queries = row[:6], row[6:]
        value = {1 + (token - 9) // ANSWERS: (token - 9) % ANSWERS for token in pairs}
        assert len(value) == 6
        assert asked == [IGNORE] * 6 + [41 + value[key] for key in queries]


@pytest.mark.parametrize("wrong", [{"first": 0}, {"first": 9}, {"growing": 1.5}])
def test_a_curriculum_that_cannot_grow_is_refused(wrong):
    with pytest.raises(ValueError, match="1 to pairs=8 and 0 to 1"):
        Curriculum(pairs=8, steps=10, **wrong)


class Lookup(nn.Module):
    """A learned table of the token behind the first place of the same token: recall but for the table."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, tokens):
        same = tokens[:, :, None] == tokens[:, None, :]
        first = same.int().argmax(-1)
        return self.table(tokens.gather(1, (first + 1).clamp_max(tokens.shape[1] - 1)))


def test_training_uses_the_recipe_and_measures_with_all_pairs():
    recipe = RecallRecipe(Curriculum(pairs=4, steps=60, batch=8, vocabulary=16))
    config = recipe.config(0.1, seed=3)
    assert (config.steps, config.lr, config.warmup, config.final_lr, config.seed) == (60, 0.1, 6, 0.0, 3)
    torch.manual_seed(0)
    model = Lookup(16)
    result = train_recall(model, recipe, 0.1, seed=0, marks=3)
    assert [step for step, _ in result.curve] == [20, 40, 60]
    assert result.accuracy == result.curve[-1][1] == 1.0
    assert result.curve[0][1] <= result.accuracy
    inputs, labels = recipe.held_out()[0]
    want = multi_query_recall(64, HELD_OUT_SEED, length=12, pairs=4, vocabulary=16)
    assert torch.equal(inputs, want[0])
    assert torch.equal(labels, want[1])
    right = (model(inputs).argmax(-1) == labels)[labels != IGNORE]
    assert right.all()


def test_the_same_seed_gives_the_same_model():
    recipe = RecallRecipe(Curriculum(pairs=4, steps=5, batch=2, vocabulary=16))
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = Lookup(16)
        train_recall(model, recipe, 0.1, seed)
        weights.append(model.table.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
