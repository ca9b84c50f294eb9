# SPDX-License-Identifier: Apache-2.0
"""Texts to vectors: pooling over real tokens, the order of places, the broken-off forward pass."""

from __future__ import annotations

import pytest
import torch
from steer_models import source, tiny_llama

from tilewright.capture import tapped
from tilewright.steer.activations import Collector, encode, pool
from tilewright.steer.pairs import HELD_OUT, PAIRS, TRAIN, pair

PLACES = ["model.layers.1.post_attention_layernorm", "model.layers.0.input_layernorm", "model.layers.1"]


def by_hand(model, texts, name, how):
    """One text at a time, without padding."""
    rows = []
    for ids in texts:
        taken = []
        with torch.no_grad(), tapped(model, {name: lambda _n, x, to=taken: to.append(x[0])}):
            model(torch.tensor([ids]))
        x = taken[0].float()
        rows.append({"mean": x.mean(0), "last": x[-1], "max": x.amax(0)}[how])
    return torch.stack(rows)


@pytest.mark.parametrize("how", ["mean", "last", "max"])
def test_padded_batches_give_each_texts_own_vector(how):
    model, texts = tiny_llama(), source(7)
    with torch.no_grad(), Collector(model, PLACES, how) as run:
        seen = run(encode(texts, None, "source"))
    assert list(seen) == [PLACES[1], PLACES[0], PLACES[2]], "in the order of computation"
    for name, got in seen.items():
        assert torch.allclose(got, by_hand(model, texts, name, how), atol=2e-6)


@pytest.mark.parametrize("how", ["mean", "last", "max"])
def test_padding_on_either_side_gives_the_same(how):
    model, texts = tiny_llama(), source(7)
    right = encode(texts, None, "source")
    longest = right["input_ids"].shape[1]
    left = {
        "input_ids": torch.tensor([[0] * (longest - len(t)) + t for t in texts]),
        "attention_mask": torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts]),
    }
    with torch.no_grad(), Collector(model, PLACES, how) as run:
        one, other = run(right), run(left)
    for name in PLACES:
        assert torch.allclose(one[name], other[name], atol=2e-6)


def test_padding_is_never_pooled():
    x = torch.full((2, 4, 3), torch.nan)
    x[0, 1:3], x[1] = 2.0, 5.0
    mask = torch.tensor([[False, True, True, False], [True] * 4])
    assert torch.isfinite(pool(x.masked_fill(~mask[..., None], -9), mask, "mean")).all()
    for how in ("last", "max"):
        assert pool(x.nan_to_num(9e9), mask, how).tolist() == [[2.0] * 3, [5.0] * 3]


def test_nothing_runs_behind_the_last_place():
    model, ran = tiny_llama(), []
    watched = {"model.layers.2": lambda name, _x: ran.append(name), "lm_head": lambda name, _x: ran.append(name)}
    with torch.no_grad(), tapped(model, watched), Collector(model, PLACES, "mean") as run:
        run(encode(source(2), None, "source"))
    assert ran == []


def test_activations_that_are_not_finite_are_named():
    from tilewright.steer import steer

    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.1.input_layernorm: activations hold NaN or infinite"):
        steer(model, "mean_act", source=source(2), target=source(2))


@pytest.mark.parametrize("name", PAIRS)
def test_shipped_pairs_are_distinct_and_unpaired(name):
    train, held_out = pair(name), pair(name, "held-out")
    assert [len(side) for side in (*train, *held_out)] == [TRAIN, TRAIN, HELD_OUT, HELD_OUT]
    everything = [text for side in (*train, *held_out) for text in side]
    assert len(set(everything)) == len(everything)
    assert pair(name) == train
    assert pair(name, seed=1) != train
    assert all(len(text.split()) <= 9 for text in everything)


def test_sides_of_a_pair_share_no_counterpart():
    present, past = pair("present-past", "held-out")
    subjects = {(" ".join(t.split()[:2]), t.split()[-1]) for t in present}
    assert not subjects & {(" ".join(t.split()[:2]), t.split()[-1]) for t in past if t.split()[1] in ("reads", "read")}
    with pytest.raises(ValueError, match="pair 'cats' is not known; known are weather-animals"):
        pair("cats")
    with pytest.raises(ValueError, match="part 'test'"):
        pair("present-past", "test")
    with pytest.raises(ValueError, match=r"count = 33, needed 1 \.\. 32"):
        pair("present-past", count=33)
