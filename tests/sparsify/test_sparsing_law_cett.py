# SPDX-License-Identifier: Apache-2.0
"""CETT and its thresholds against sums of neuron vectors and the sorted oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tilewright.capture import tapped
from tilewright.reference import cett as oracle
from tilewright.sparsify.sparsing_law import TailError
from tilewright.sparsify.sparsing_law.cett import STEP
from tilewright.sparsify.sparsing_law.neurons import column_norms, neuron_thresholds

WIDTH, NEURONS, TOKENS = 32, 64, 200
TARGETS = [0.01, 0.05, 0.2, 0.5, 0.9]


def seen_by_hook(act, seed=0):
    """h and Wo of a random gated block in float64."""
    torch.manual_seed(seed)
    gate, up = (nn.Linear(WIDTH, NEURONS, bias=False, dtype=torch.float64) for _ in range(2))
    down = nn.Linear(NEURONS, WIDTH, bias=True, dtype=torch.float64)
    seen = []
    block = nn.ModuleDict({"down": down})
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    with torch.no_grad(), tapped(block, {"down@input": lambda _, h: seen.append(h)}):
        down(act(gate(x)) * up(x))
    return seen[0], down.weight.detach()


@pytest.mark.parametrize("act", [torch.relu, nn.functional.silu, nn.functional.gelu])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_error_is_that_of_summed_neuron_vectors(act, share):
    h, weight = seen_by_hook(act)
    eps = float((h.abs() * column_norms(weight)).quantile(share))
    # float64 sums of 64 terms of the output's size: 64 x 2^-53 each, and cancellation in the truncated sum.
    assert TailError(h, weight).error(eps) == pytest.approx(oracle.cett(h, weight, eps), abs=1e-10)


@pytest.mark.parametrize("act", [torch.relu, nn.functional.silu])
@pytest.mark.parametrize("target", TARGETS)
def test_threshold_is_that_of_all_sorted_norms(act, target):
    h, weight = seen_by_hook(act)
    layer = TailError(h, weight)
    eps, best = layer.threshold(target), oracle.cett_threshold(h, weight, target)
    reached = oracle.cett(h, weight, eps)
    assert reached <= target
    # One neuron of one token changes the mean by at most 1/200 of its share of the output.
    assert reached == pytest.approx(oracle.cett(h, weight, best), abs=1e-3)
    assert oracle.cett(h, weight, eps * (1 + 1.01 * STEP)) > target


def test_a_threshold_does_not_depend_on_what_was_asked_before():
    h, weight = seen_by_hook(nn.functional.silu)
    alone = {target: TailError(h, weight).threshold(target) for target in TARGETS}
    together = TailError(h, weight)
    for target in reversed(TARGETS):
        assert together.threshold(target) == alone[target]
    assert together.threshold(TARGETS[2]) == alone[TARGETS[2]]


def test_nothing_but_exact_zeros_is_weak_at_zero_and_everything_at_one():
    h, weight = seen_by_hook(torch.relu)
    layer = TailError(h, weight)
    assert layer.active(layer.threshold(0.0)) == float((h != 0).double().mean())
    top = layer.threshold(1.0)
    assert oracle.cett(h, weight, top) <= 1
    if layer.error(layer.candidate(layer.steps)) <= 1:
        assert top > float((h.abs() * column_norms(weight)).max())


def test_two_equal_neurons_by_hand():
    """One output, h = (3, 1): without the small neuron a quarter of the output is missing."""
    layer = TailError(torch.tensor([[3.0, 1.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    assert layer.error(2.0) == pytest.approx(0.25, abs=1e-15)
    assert layer.threshold(0.24) < 1.001 < layer.threshold(0.26)


def test_a_column_of_zeros_is_always_weak():
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    bounds = neuron_thresholds(0.5, column_norms(weight))
    assert bounds.tolist() == [0.5, float("inf")]
    assert TailError(torch.ones(4, 2), weight).active(0.5) == 0.5


def test_silent_tokens_are_counted_and_left_out():
    h = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    layer = TailError(h, torch.ones(1, 2))
    assert layer.rows_skipped == 1
    assert layer.error(1.5) == pytest.approx(1 / 3, rel=1e-6)
    nothing = TailError(torch.zeros(3, 2), torch.ones(1, 2))
    assert nothing.rows_skipped == 3
    assert nothing.error(1.0) == 0.0
    assert nothing.active(nothing.threshold(0.3)) == 0.0


def test_rows_in_chunks_and_not_contiguous():
    torch.manual_seed(0)
    h, weight = torch.randn(NEURONS, 1100, dtype=torch.float64).T, torch.randn(NEURONS, 8, dtype=torch.float64).T
    layer = TailError(h, weight)
    whole = h @ weight.T
    weak = h.abs() * weight.norm(dim=0) < 1.0
    tail = (h * weak) @ weight.T
    assert layer.error(1.0) == pytest.approx(float((tail.norm(dim=-1) / whole.norm(dim=-1)).mean()), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 9), neurons=st.integers(1, 12), target=st.floats(0, 1), seed=st.integers(0, 99),
    zeros=st.booleans(),
)  # fmt: skip
def test_the_error_never_exceeds_the_target(tokens, neurons, target, seed, zeros):
    random = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, neurons, dtype=torch.float64, generator=random)
    h = h.relu() if zeros else h
    weight = torch.randn(5, neurons, dtype=torch.float64, generator=random)
    layer = TailError(h, weight)
    assert oracle.cett(h, weight, layer.threshold(target)) <= target


def test_bad_input_is_named():
    h, weight = torch.ones(3, 4), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"down: h has shape \[3, 4\], Wo \[2, 5\]"):
        TailError(h, torch.ones(2, 5), "down")
    with pytest.raises(ValueError, match="no token was seen"):
        TailError(h[:0], weight)
    with pytest.raises(ValueError, match="NaN or infinite"):
        TailError(torch.full((3, 4), float("nan")), weight)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="0 to 1, is needed"):
            TailError(h, weight).threshold(wrong)
