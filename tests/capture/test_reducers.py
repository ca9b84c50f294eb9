# SPDX-License-Identifier: Apache-2.0
"""Reducers against the same statistic of all rows at once, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.reducers import AbsMax, Covariance, Histogram, MeanAbs, Moments, Reservoir, Several

SPLITS = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda s: sum(s) > 0)


def rows(count, channels=5, seed=0, dtype=torch.float32, mean=0.0):
    return (torch.randn(count, channels, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


def feed(reducer, x, sizes):
    for part in x.split(sizes):
        reducer.update(part)
    return reducer.result()


@given(SPLITS)
def test_absmax_is_exact_for_any_batching(sizes):
    x = rows(sum(sizes))
    assert torch.equal(feed(AbsMax(), x, sizes), x.abs().amax(0))


@given(SPLITS)
def test_mean_abs_is_the_float64_mean(sizes):
    x = rows(sum(sizes))
    # Sums of exact float32 values in float64: n * 2^-53 relative.
    torch.testing.assert_close(feed(MeanAbs(), x, sizes), x.double().abs().mean(0), rtol=len(x) * 2**-52, atol=0)


@given(SPLITS, st.sampled_from([0.0, 1e4]))
def test_moments_survive_a_large_mean(sizes, mean):
    x = rows(sum(sizes), mean=mean)
    got = feed(Moments(), x, sizes)
    exact = x.double()
    assert got.count == len(x)
    # float64 pairwise update: a few units of mean * 2^-52 in the mean, times the spread in the variance.
    bound = 2.0**-48 * (1 + mean)
    torch.testing.assert_close(got.mean, exact.mean(0), rtol=0, atol=bound)
    torch.testing.assert_close(got.variance, exact.var(0, unbiased=False), rtol=1e-9, atol=bound)


@pytest.mark.parametrize("centered", [True, False])
@given(sizes=SPLITS)
def test_covariance_matches_float64(centered, sizes):
    x = rows(sum(sizes), mean=3.0)
    got = feed(Covariance(centered), x, sizes)
    exact = x.double()
    exact = exact - exact.mean(0) if centered else exact
    # Products of float32 values up to 8 in magnitude, summed in float32 within a batch of at most 9 rows.
    torch.testing.assert_close(got, exact.T @ exact / len(x), rtol=0, atol=64 * 10 * 2.0**-23)


def test_covariance_keeps_precision_beside_a_large_mean():
    x = rows(1000, mean=1000.0)
    got = feed(Covariance(), x, [500, 500])
    exact = torch.cov(x.double().T, correction=0)
    # The shift leaves values of a few units: the float32 products are as accurate as without the mean,
    # where uncentred float32 products of 1e6 would be off by 0.06 each.
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-3)


def test_covariance_refuses_rows_with_structure():
    with pytest.raises(ValueError, match=r"rows \[n, C\], got \[2, 3, 4\]"):
        Covariance().update(torch.ones(2, 3, 4))


@given(SPLITS)
def test_histogram_counts_every_value_once(sizes):
    x = rows(sum(sizes))
    got = feed(Histogram(-1.0, 1.0, 8), x, sizes)
    assert int(got.counts.sum()) + got.below + got.above == x.numel()
    assert got.below == int((x < -1).sum())
    assert got.above == int((x > 1).sum())
    inside = x[(x >= -1) & (x <= 1)]
    assert torch.equal(got.counts, torch.histc(inside, 8, -1.0, 1.0).long())


def test_histogram_edges_belong_to_the_right_bins():
    got = feed(Histogram(0.0, 1.0, 2), torch.tensor([[0.0, 0.5, 1.0, 1.5, -0.5]]), [1])
    assert got.counts.tolist() == [1, 2]
    assert (got.below, got.above) == (1, 1)


@pytest.mark.parametrize("arguments", [(1.0, 1.0, 4), (0.0, 1.0, 0)])
def test_histogram_without_room_is_refused(arguments):
    with pytest.raises(ValueError, match="need low < high"):
        Histogram(*arguments)


@given(SPLITS)
def test_reservoir_is_the_same_sample_in_any_batching(sizes):
    x = torch.arange(sum(sizes)).float()[:, None]
    split = feed(Reservoir(7, seed=3), x, sizes)
    whole = feed(Reservoir(7, seed=3), x, [len(x)])
    assert sorted(split.flatten().tolist()) == sorted(whole.flatten().tolist())
    assert len(split) == min(7, len(x))
    assert len(set(split.flatten().tolist())) == len(split)


def test_reservoir_takes_each_row_equally_often():
    counts = torch.zeros(20)
    draws = 2000
    for seed in range(draws):
        kept = feed(Reservoir(5, seed=seed), torch.arange(20).float()[:, None], [3, 10, 7])
        counts[kept.flatten().long()] += 1
    # Binomial(2000, 1/4): standard deviation 19.4; six of them bound 20 counts with odds of 4e-8.
    assert float((counts - draws / 4).abs().max()) < 6 * (draws * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("make", [AbsMax, MeanAbs, Moments, Covariance, lambda: Histogram(0, 1), lambda: Reservoir(2)])
def test_no_rows_is_an_error_and_not_a_zero(make):
    reducer = make()
    reducer.update(torch.empty(0, 3))
    with pytest.raises(ValueError, match="has seen no activation"):
        reducer.result()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_widened(dtype):
    x = rows(300, dtype=dtype)
    assert feed(AbsMax(), x, [100, 200]).dtype == torch.float32
    got = feed(Covariance(centered=False), x, [100, 200])
    exact = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(got, exact, rtol=0, atol=32 * 200 * 2.0**-23)


def test_several_reducers_share_the_rows():
    x = rows(12)
    largest, mean = feed(Several(AbsMax, MeanAbs), x, [5, 7])
    assert torch.equal(largest, feed(AbsMax(), x, [12]))
    torch.testing.assert_close(mean, feed(MeanAbs(), x, [12]))
