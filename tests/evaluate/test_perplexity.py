# SPDX-License-Identifier: Apache-2.0
"""Perplexity against its definition, token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.evaluate import perplexity, token_batches, windows

VOCABULARY = 11


def bigram(seed=0, dtype=torch.float32):
    """A model whose next-token logits depend on the current token only, so that windows do not matter."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return table, lambda tokens: table[tokens]


def text(length, seed=1):
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


@st.composite
def window_and_stride(draw):
    window = draw(st.integers(2, 40))
    return window, draw(st.integers(1, window))


@given(st.integers(0, 200), window_and_stride())
def test_no_token_is_scored_twice_and_overlap_scores_all(length, sizes):
    window, stride = sizes
    parts = list(windows(length, window, stride))
    scored = [t for p in parts for t in range(p.first, p.end)]
    assert len(scored) == len(set(scored))
    assert all(0 <= p.start < p.first < p.end <= length and p.end - p.start <= window for p in parts)
    if stride < window:
        assert scored == list(range(1, length))
    else:
        assert scored == [t for t in range(length) if t % window]


@pytest.mark.parametrize("sizes", [(1, 1), (8, 0), (8, 9)])
def test_impossible_windows_are_refused(sizes):
    with pytest.raises(ValueError, match="need window >= 2"):
        list(windows(20, *sizes))


@given(st.integers(2, 90), window_and_stride())
def test_equals_the_definition_on_the_scored_tokens(length, sizes):
    table, model = bigram()
    tokens = text(length)
    got = perplexity(model, tokens, window=sizes[0], stride=sizes[1])
    scored = [t for p in windows(length, *sizes) for t in range(p.first, p.end)]
    log_p = torch.log_softmax(table.double(), -1)
    nll = [-float(log_p[tokens[t - 1], tokens[t]]) for t in scored]
    assert got.tokens == len(scored)
    # Both sums are float64 over at most 89 terms.
    assert got.nll == pytest.approx(sum(nll) / len(nll), rel=1e-13)
    assert got.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-12)


def test_longer_context_reaches_the_model():
    seen = []

    def model(tokens):
        seen.append(tokens[0].tolist())
        return torch.zeros(1, tokens.shape[1], VOCABULARY)

    tokens = text(10)
    got = perplexity(model, tokens, window=4, stride=2)
    assert seen == [tokens[s : s + 4].tolist() for s in (0, 2, 4, 6)]
    assert got.perplexity == pytest.approx(VOCABULARY, rel=1e-12)
    assert got.stderr == pytest.approx(0, abs=1e-7)


def test_bfloat16_logits_are_summed_in_float64():
    table, model = bigram(dtype=torch.bfloat16)
    tokens = text(400)
    log_p = torch.log_softmax(table.double(), -1)
    exact = -log_p[tokens[:-1], tokens[1:]].mean()
    assert perplexity(model, tokens, window=100, stride=50).nll == pytest.approx(float(exact), rel=1e-12)


def test_max_tokens_cuts_and_says_so():
    _, model = bigram()
    cut = perplexity(model, text(100), window=10, max_tokens=35)
    assert cut.truncated
    assert cut.nll == perplexity(model, text(100)[:35], window=10).nll
    assert not perplexity(model, text(100), window=10, max_tokens=100).truncated


@pytest.mark.parametrize("length", [0, 1])
def test_text_without_a_prediction_is_refused(length):
    with pytest.raises(ValueError, match=f"has {length} token"):
        perplexity(bigram()[1], text(length))


def test_float_tokens_are_refused():
    with pytest.raises(ValueError, match="integers"):
        perplexity(bigram()[1], torch.ones(9))


def test_wrong_logits_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[1, 9, vocabulary\] is needed"):
        perplexity(lambda _: torch.zeros(1, 3, VOCABULARY), text(9))


def test_nan_logits_are_named_not_averaged():
    def model(tokens):
        out = torch.zeros(1, tokens.shape[1], VOCABULARY)
        out[0, 2] = math.nan
        return out

    with pytest.raises(ValueError, match=r"at tokens 0\.\.9 hold NaN"):
        perplexity(model, text(9))


def test_transformers_output_objects_are_accepted():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    _, model = bigram()
    assert perplexity(lambda t: Output(model(t)), text(30)).nll == perplexity(model, text(30)).nll


def test_token_batches_are_consecutive_and_whole():
    batches = token_batches(torch.arange(10), length=4)
    assert [b.tolist() for b in batches] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    with pytest.raises(ValueError, match="10 tokens give 2 batches of 4; 3 are needed"):
        token_batches(torch.arange(10), length=4, count=3)
