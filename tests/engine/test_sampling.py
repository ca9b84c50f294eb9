# SPDX-License-Identifier: Apache-2.0
"""Sampling against a numpy oracle that draws the same random numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.ops.engine import sample


def philox(seed: int, step: int) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011, section 4), as in the Random123 reference."""
    counter, key = [step & 0xFFFFFFFF, step >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (b >> 32) ^ counter[1] ^ key[0],
            b & 0xFFFFFFFF,
            (a >> 32) ^ counter[3] ^ key[1],
            a & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def uniform(seed: int, step: int) -> float:
    words = philox(seed, step)
    return ((words[0] << 32 | words[1]) >> 11) / 2**53


def kept_distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """Kept tokens and their probabilities, in the order in which they are drawn from."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    if 0 < top_k < len(logits):
        order = order[:top_k]
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    if top_p < 1:
        cumulative = np.cumsum(weights) / weights.sum()
        count = int(np.searchsorted(cumulative, top_p)) + 1
        order, weights = order[:count], weights[:count]
    elif not 0 < top_k < len(logits):
        by_token = np.argsort(order)
        order, weights = order[by_token], weights[by_token]
    return order, weights / weights.sum()


def test_philox_gives_the_published_numbers() -> None:
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 400),
    temperature=st.floats(0.05, 4),
    top_k=st.integers(0, 450),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
)
def test_the_drawn_token_is_the_one_the_random_number_falls_on(
    size: int, temperature: float, top_k: int, top_p: float, seed: int, step: int
) -> None:
    generator = np.random.default_rng(seed)
    logits = (generator.standard_normal(size) * 3).astype(np.float32)
    token = int(sample(torch.from_numpy(logits)[None], temperature, top_k, top_p, seed, step)[0])
    # float32 weights are off by about 1e-6 of themselves: near a border either neighbour is right
    accepted = set()
    for p in (top_p, min(1.0, top_p * (1 + 1e-5)), top_p * (1 - 1e-5)):
        order, probability = kept_distribution(logits, temperature, top_k, p)
        edges = np.cumsum(probability)
        for u in (uniform(seed, step) + shift for shift in (-1e-5, 0.0, 1e-5)):
            accepted.add(int(order[min(int(np.searchsorted(edges, u, side="right")), len(order) - 1)]))
    assert token in accepted


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -math.inf]])
    draws = 4000
    counts = np.zeros(5)
    for step in range(draws):
        counts[int(sample(logits, 1.0, seed=3, step=step)[0])] += 1
    expected = torch.softmax(logits[0].double(), 0).numpy()
    # six standard deviations of a binomial count
    assert np.all(np.abs(counts - draws * expected) <= 6 * np.sqrt(draws * expected * (1 - expected)) + 1e-9)


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(2, 70)
    logits[0, [33, 40]] = 5.0
    assert sample(logits).tolist() == [33, 0]
    assert sample(logits, 0.7, 1).tolist() == [33, 0]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 49152])
def test_greedy_at_every_size(size: int) -> None:
    logits = torch.randn(3, size)
    assert sample(logits).tolist() == logits.argmax(-1).tolist()
    assert sample(logits.double()).tolist() == logits.argmax(-1).tolist()


def test_rows_do_not_influence_each_other() -> None:
    logits = torch.randn(5, 300)
    together = sample(logits, 0.9, 40, 0.9, 17, 4)
    assert together.tolist() == [int(sample(row[None], 0.9, 40, 0.9, 17, 4)[0]) for row in logits]


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 100), -math.inf)
    logits[0, 7] = -1e30
    for step in range(50):
        assert int(sample(logits, 100.0, seed=1, step=step)[0]) == 7


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 16, 69])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value: float, at: int, temperature: float) -> None:
    logits = torch.zeros(1, 70)
    logits[0, at] = value
    with pytest.raises(RuntimeError, match="logits hold NaN or"):
        sample(logits, temperature)


def test_wrong_options_are_errors() -> None:
    logits = torch.zeros(1, 4)
    for options, message in (
        ((-1.0,), "temperature"),
        ((math.nan,), "temperature"),
        ((1.0, -1), "top_k"),
        ((1.0, 0, 0.0), "top_p"),
        ((1.0, 0, 1.5), "top_p"),
    ):
        with pytest.raises(RuntimeError, match=message):
            sample(logits, *options)
    with pytest.raises(RuntimeError, match="every logit is -inf"):
        sample(torch.full((1, 4), -math.inf))
    with pytest.raises(RuntimeError, match="logits"):
        sample(torch.zeros(4))
    with pytest.raises(RuntimeError, match="logits"):
        sample(torch.zeros(2, 0))
    assert sample(torch.zeros(0, 4)).shape == (0,)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.tilewright.sample, (torch.randn(2, 30), 0.8, 5, 0.9, 1, 2))
