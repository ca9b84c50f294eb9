# SPDX-License-Identifier: Apache-2.0
"""One sweep against the equations written out in float64 numpy; winner-take-all; the loss; edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.inspect.snmf import factorise as core
from tilewright.inspect.snmf import sweep
from tilewright.inspect.snmf.matrix import Activations, Features


def naive_sweep(a, g, keep, reg, floor=sweep.FLOOR):
    """Steps a to e of Ding, Li and Jordan with winner-take-all; a [d, n], g [n, k], float64."""
    gram = g.T @ g
    f = a @ g @ np.linalg.inv(gram + reg * np.eye(len(gram)))
    for j in range(f.shape[1]):
        order = sorted(range(len(f)), key=lambda i: (-abs(f[i, j]), i))
        f[order[keep:], j] = 0
    c = np.maximum(np.sqrt((g**2).sum(0)), 1e-8)
    g, f = g / c, f * c
    p, q = a.T @ f, f.T @ f
    above = (abs(p) + p) / 2 + g @ ((abs(q) - q) / 2)
    below = (abs(p) - p) / 2 + g @ ((abs(q) + q) / 2)
    below = np.maximum(below, floor * abs(p).max(1, keepdims=True))
    g = g * np.sqrt(np.clip(above / below, 0, 1e12))
    return f, g, ((a - f @ g.T) ** 2).sum()


def prepared(d, n, k, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((d, n)), random.random((n, k)) + 1e-3


@pytest.mark.parametrize(
    ("d", "n", "k", "p"), [(30, 41, 5, 1.0), (200, 97, 7, 0.05), (64, 5000, 3, 0.01), (1, 1, 1, 1.0)]
)
def test_a_sweep_is_that_of_the_equations(d, n, k, p):
    a, g = prepared(d, n, k)
    data = Activations(torch.from_numpy(a.T), torch.float64)
    options = core.Settings(k, p, 1, 0.0, 1, 1e-6, False)
    y = torch.from_numpy(g.T.copy())
    gram = y @ y.T
    for _ in range(3):
        f, g, wanted = naive_sweep(a, g, options.kept(d), options.reg)
        found = core.one_sweep(data, y, gram, options)
        y, gram = found.y, found.gram
        # float64 has 2e-16; three sweeps of products over at most 5000 tokens and a well-conditioned solve.
        np.testing.assert_allclose(found.features.dense().numpy().T, f, rtol=1e-10, atol=1e-10 * abs(f).max())
        np.testing.assert_allclose(y.numpy().T, g, rtol=1e-10, atol=1e-10 * g.max())
        assert found.loss == pytest.approx(wanted, rel=1e-10, abs=1e-10 * (a**2).sum())


@given(
    zt=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4), keep=st.integers(1, 7)
)
@settings(max_examples=80, deadline=None)
def test_winner_take_all_keeps_exactly_the_largest_and_the_first_of_equals(zt, keep):
    rows = torch.tensor(zt, dtype=torch.float64)
    found = sweep.winner_take_all(rows, keep)
    assert found.index.shape == (len(zt), min(keep, 6))
    for row, index in zip(zt, found.index.tolist(), strict=True):
        order = sorted(range(6), key=lambda i: (-abs(row[i]), i))
        assert index == sorted(order[:keep])
    dense = found.dense()
    assert torch.equal(dense.gather(1, found.index), rows.gather(1, found.index))


def test_sparse_and_dense_products_agree():
    a = torch.randn(300, 50, dtype=torch.float64)
    features = sweep.winner_take_all(torch.randn(9, 300, dtype=torch.float64), 4)
    wanted = features.dense() @ a
    assert torch.allclose(features.times(a), wanted, rtol=1e-13, atol=1e-13)
    few = Features(features.index, features.value, 300)
    assert torch.equal(few.scaled(torch.full((9,), 2.0)).dense(), 2 * features.dense())


def test_refit_is_least_squares_on_the_kept_entries_and_never_worse():
    a, g = prepared(80, 120, 6)
    y = torch.from_numpy(g.T.copy())
    at = torch.from_numpy(a)
    gram, ay = y @ y.T, at @ y.T
    cut = sweep.winner_take_all(sweep.solve_features(ay, gram, 0.0), 20)
    better = sweep.refit(cut, ay, gram, 0.0)
    assert torch.equal(better.index, cut.index)
    mask = torch.zeros(6, 80, dtype=torch.bool).scatter_(1, cut.index, True).numpy()
    wanted = np.zeros((6, 80))
    for i in range(80):
        some = mask[:, i]
        if some.any():
            wanted[some, i] = np.linalg.lstsq(g[:, some], a[i], rcond=None)[0]
    np.testing.assert_allclose(better.dense().numpy(), wanted, rtol=1e-9, atol=1e-9)
    assert ((a - better.dense().numpy().T @ g.T) ** 2).sum() < ((a - cut.dense().numpy().T @ g.T) ** 2).sum()


def test_singular_gram_without_ridge_is_solved_on_its_range():
    y = torch.ones(2, 5, dtype=torch.float64)
    a = torch.randn(4, 5, dtype=torch.float64)
    zt = sweep.solve_features(a @ y.T, y @ y.T, 0.0)
    assert torch.allclose(zt.sum(0), a.mean(1))


def test_efficient_loss_is_the_reconstructions():
    a, g = prepared(40, 60, 4)
    f = np.random.default_rng(1).standard_normal((40, 4))
    cross, q, gram = float(((a.T @ f) * g).sum()), torch.from_numpy(f.T @ f), torch.from_numpy(g.T @ g)
    wanted = ((a - f @ g.T) ** 2).sum()
    assert sweep.loss(float((a**2).sum()), cross, q, gram) == pytest.approx(wanted, rel=1e-12)
    assert sweep.loss(0.0, 1.0, q * 0, gram) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_without_winner_take_all_the_loss_never_rises(seed):
    x = torch.randn(400, 100, dtype=torch.float64)
    data = Activations(x, torch.float64)
    options = core.Settings(10, 1.0, 120, 0.0, 120, 0.0, False)
    losses = np.array(core.factorise(data, core.start_random(10, 400, data, seed), options).losses)
    # Round-off of ||A||^2 - 2 <P, Y> + <Q, G> in float64 stays under 1e-12 of the loss, which is most of ||A||^2.
    assert len(losses) == 120
    assert (np.diff(losses) <= 1e-12 * losses[:-1]).all()


def test_dead_tokens_and_neurons_do_no_harm(poisoned):
    x = torch.randn(60, 30)
    x[7], x[:, 4] = 0, 0
    data = Activations(x, torch.float32)
    found = core.factorise(data, core.start_random(4, 60, data, 0), core.Settings(4, 1.0, 50, 0.0, 50, 1e-6, False))
    assert torch.isfinite(found.components).all()
    assert torch.isfinite(found.coefficients).all()
    assert (found.components[:, 4] == 0).all()
    assert found.losses[-1] < data.squared


def test_feature_that_no_token_uses_starts_again(caplog):
    data = Activations(torch.randn(50, 20), torch.float64)
    y = core.start_random(3, 50, data, 0)
    y[1] = 0
    with caplog.at_level("INFO", logger=core.LOG.name):
        found = core.factorise(data, y, core.Settings(3, 1.0, 30, 0.0, 30, 1e-6, False))
    assert "feature 1" in caplog.text
    assert found.coefficients[1].max() > 0
    assert float((data._blocks[0] - found.components.T @ found.coefficients).square().sum()) == pytest.approx(
        found.best
    )


def test_the_best_sweep_is_returned():
    data = Activations(torch.randn(80, 50), torch.float64)
    found = core.factorise(data, core.start_random(8, 80, data, 0), core.Settings(8, 0.1, 60, 0.0, 60, 1e-6, False))
    again = float((data._blocks[0] - found.components.T @ found.coefficients).square().sum())
    assert found.best == min(found.losses)
    assert again == pytest.approx(found.best, rel=1e-10)


def test_patience_ends_a_run_that_stands_still():
    data = Activations(torch.ones(10, 4), torch.float64)
    found = core.factorise(data, core.start_random(1, 10, data, 0), core.Settings(1, 1.0, 500, 1e-3, 5, 1e-6, False))
    assert len(found.losses) < 50


def test_blocks_give_what_one_matrix_gives():
    x = torch.randn(90, 25, dtype=torch.float64)
    whole, parts = Activations(x, torch.float64), Activations([x[:40], x[40:40], x[40:]], torch.float64)
    options = core.Settings(5, 0.2, 20, 0.0, 20, 1e-6, False)
    one = core.factorise(whole, core.start_random(5, 90, whole, 3), options)
    other = core.factorise(parts, core.start_random(5, 90, parts, 3), options)
    assert torch.allclose(one.components, other.components, rtol=1e-9, atol=1e-9)
    assert torch.equal(whole.column(57), parts.column(57))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_row(value):
    x = torch.zeros(9, 600)
    x[6, 599], x[8, 0] = value, value
    with pytest.raises(ValueError, match="row 6"):
        Activations(x, torch.float32)
    with pytest.raises(ValueError, match="row 6"):
        Activations([x[:5], x[5:]], torch.float32)


def test_overflowing_loss_names_its_sweep():
    data = Activations(torch.full((5, 3), 3e19), torch.float32)
    with pytest.raises(RuntimeError, match="sweep 1"):
        core.factorise(data, core.start_random(2, 5, data, 0), core.Settings(2, 1.0, 5, 0.0, 5, 1e-6, False))
