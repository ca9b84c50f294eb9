# SPDX-License-Identifier: Apache-2.0
"""Exact and streamed quantiles of magnitudes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.sparsify.quantiles import LogHistogram, Magnitudes


def fed(kind: Any, *parts: torch.Tensor) -> Any:
    made = kind()
    for part in parts:
        made.update(part)
    return made.result()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 20), min_size=1, max_size=60), k=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.99])
)
def test_exact_is_the_value_of_its_rank(values: list[int], k: float) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    rank = math.ceil(round(k * len(values), 9))
    wanted = 0.0 if rank == 0 else sorted(values)[rank - 1]
    found = fed(Magnitudes, x[:3], -x[3:]).quantile(k)
    assert found == wanted
    dropped = float((x < found).float().mean())
    assert dropped <= k + 1e-6
    # only what equals the threshold is kept against the share
    assert dropped + float((x == found).float().mean()) >= k - 1e-6


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
@pytest.mark.parametrize("k", [0.1, 0.5, 0.7, 0.9, 0.99])
def test_histogram_drops_the_share(scale: float, k: float) -> None:
    x = torch.randn(20_000) * scale
    x[::7] *= 40  # far above 1, where a histogram of [-1, 1] ends
    exact, streamed = fed(Magnitudes, x).quantile(k), fed(LogHistogram, x[:99], x[99:]).quantile(k)
    assert abs(float((x.abs() < streamed).float().mean()) - k) <= 0.002
    assert abs(streamed / exact - 1) <= 2**-13


def test_zeros_are_counted() -> None:
    x = torch.cat([torch.zeros(60), torch.ones(40)])
    for kind in (Magnitudes, LogHistogram):
        found = fed(kind, x)
        assert found.quantile(0.5) == 0.0
        assert 0.9 < found.quantile(0.9) <= 1.01
        assert found.quantile(0.0) == 0.0


def test_parts_add_up() -> None:
    x, y = torch.randn(500), 3 * torch.randn(700)
    for kind in (Magnitudes, LogHistogram):
        both = fed(kind, x) + fed(kind, y)
        assert both.count == 1200
        assert both.quantile(0.4) == fed(kind, torch.cat([x, y])).quantile(0.4)


@pytest.mark.parametrize("kind", [Magnitudes, LogHistogram])
def test_bad_input(kind: Any) -> None:
    for k in (1.0, -0.1, float("nan"), 2.0):
        with pytest.raises(ValueError, match="below 1"):
            fed(kind, torch.ones(4)).quantile(k)
    with pytest.raises(ValueError, match="no activation"):
        fed(kind).quantile(0.5)
    with pytest.raises(ValueError, match="NaN"):
        fed(kind, torch.tensor([1.0, float("nan")]))
