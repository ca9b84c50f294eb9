# SPDX-License-Identifier: Apache-2.0
"""The decomposition of an SAE's error: identities, numpy's regression as oracle, controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tilewright.inspect.sae import Rows, SAEConfig, SAETrainer, TopKSAE
from tilewright.inspect.sae_dark_matter import VECTORS, LeastSquares, SAEErrorAnalysis
from tilewright.inspect.sae_dark_matter.analysis import line_r2

D, N = 12, 6000


def activations(count=N, seed=0, loud=True):
    """Correlated rows with a mean and three loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, D, generator=generator) @ mix + 0.5
    x[:, :3] *= 30 if loud else 1
    return x


@pytest.fixture(scope="module")
def data():
    x, y = activations(), activations(seed=1)
    sae = SAETrainer(SAEConfig(width=48, k=4, steps=200, batch=256, lr=3e-3)).fit(x)
    return sae, x, y


class Plain:
    """Only what any SAE object has."""

    def __init__(self, recon):
        self.recon = recon

    def encode(self, x):
        return x

    def decode(self, latents):
        return self.recon(latents)


def by_hand(sae, x, y, intercept):
    """float64 numpy: (B, error of y, nonlinear error of y)."""
    with torch.no_grad():
        ex, ey = ((v - sae(v)[0]).double().numpy() for v in (x, y))
    design, test = x.double().numpy(), y.double().numpy()
    if intercept:
        design, test = (np.concatenate([v, np.ones((len(v), 1))], 1) for v in (design, test))
    weight = np.linalg.lstsq(design, ex, rcond=None)[0]
    return weight, ey, ey - test @ weight


@pytest.mark.parametrize("intercept", [False, True])
def test_decomposition_is_that_of_least_squares(data, intercept):
    sae, x, y = data
    analysis = SAEErrorAnalysis(sae, x, y, intercept=intercept)
    weight, error, rest = by_hand(sae, x, y, intercept)
    # The relative ridge of 1e-9 moves a coefficient by at most 1e-9 x mean eigenvalue / least eigenvalue.
    eigenvalues = np.linalg.eigvalsh(np.cov(x.double().numpy().T))
    bound = 10 * 1e-9 * eigenvalues.mean() / eigenvalues.min() * np.abs(weight).max()
    assert np.abs(analysis.B.weight.numpy().T - weight[:D]).max() <= bound
    spread = np.square(y.double().numpy() - y.double().numpy().mean(0)).sum()
    fvu, r2 = analysis.fvu(), analysis.r2()
    assert fvu.sae == pytest.approx(np.square(error).sum() / spread, rel=1e-6)
    assert fvu.nonlinear == pytest.approx(np.square(rest).sum() / spread, rel=1e-5)
    assert fvu.linear == pytest.approx(fvu.sae - fvu.nonlinear)
    assert r2.r2_global == pytest.approx(1 - np.square(rest).sum() / np.square(error).sum(), rel=1e-5)
    by_dim = 1 - np.square(rest).sum(0) / np.square(error - error.mean(0)).sum(0)
    assert r2.r2_dim_mean == pytest.approx(by_dim.mean(), rel=1e-4)
    quiet = np.setdiff1d(np.arange(D), np.argsort(-x.var(0).numpy())[:3])
    robust = analysis.fvu(robust=True)
    inner = y.double().numpy()[:, quiet]
    assert robust.sae == pytest.approx(
        np.square(error[:, quiet]).sum() / np.square(inner - inner.mean(0)).sum(), rel=1e-6
    )
    ratio = np.square(error).sum(1) / np.square(y.double().numpy()).sum(1)
    assert fvu.normalized_mse == pytest.approx(ratio.mean(), rel=1e-6)
    assert np.allclose(analysis.error_norms.numpy(), np.sqrt(np.square(error).sum(1)), rtol=1e-6)
    assert np.allclose(analysis.nonlinear_norms.numpy(), np.sqrt(np.square(rest).sum(1)), rtol=1e-4)


def test_parts_sum_to_the_activation(data):
    sae, x, y = data
    analysis = SAEErrorAnalysis(sae, x, y)
    with torch.no_grad():
        total = sae(y)[0] + analysis.linear_error(y) + analysis.nonlinear_error(y)
    # Three roundings of float32 at the size of the largest term.
    bound = 4 * torch.finfo(torch.float32).eps * float(torch.stack([y.abs(), analysis.linear_error(y).abs()]).max())
    assert float((total - y).abs().max()) <= bound


@pytest.mark.parametrize("robust", [False, True])
def test_on_the_fitted_tokens_the_linear_part_takes_error_away(data, robust):
    sae, x, _ = data
    analysis = SAEErrorAnalysis(sae, x, x)
    fvu = analysis.fvu(robust=robust)
    assert 0 <= fvu.nonlinear <= fvu.sae
    assert -0.05 < analysis.r2().shuffled < 0.05


def test_dead_sae_has_only_linear_error():
    x, y = activations(loud=False), activations(seed=1, loud=False)
    dead = Plain(lambda latents: torch.full_like(latents, 0.3))
    for intercept in (False, True):
        r2 = SAEErrorAnalysis(dead, x, y, intercept=intercept).r2()
        assert r2.r2_global >= 0.999 if intercept else r2.r2_global >= 0.9
    zero = Plain(torch.zeros_like)
    assert SAEErrorAnalysis(zero, x, y).r2().r2_global >= 0.999


def test_independent_noise_has_no_linear_error():
    x, y = activations(), activations(seed=1)
    noisy = Plain(lambda latents: latents + torch.randn(latents.shape, generator=generator))
    generator = torch.Generator().manual_seed(7)
    assert abs(SAEErrorAnalysis(noisy, x, y).r2().r2_global) <= 0.02


def test_shuffled_control_shows_the_bias_of_few_tokens():
    """With n = 8 d fitting tokens, errors without any relation score about -1 / (n / d - 1)."""
    x, y = activations(8 * D), activations(4000, seed=1)
    noisy = Plain(lambda latents: latents + torch.randn(latents.shape, generator=generator))
    generator = torch.Generator().manual_seed(7)
    scores = [SAEErrorAnalysis(noisy, x, y, shuffle_seed=seed).r2().shuffled for seed in range(20)]
    assert float(np.mean(scores)) == pytest.approx(-1 / 7, abs=0.04)


def test_shrinkage_alone_is_linear_error_and_is_named():
    x, y = activations(loud=False), activations(seed=1, loud=False)
    shrunk = Plain(lambda latents: 0.8 * latents + torch.randn(latents.shape, generator=generator))
    generator = torch.Generator().manual_seed(7)
    r2 = SAEErrorAnalysis(shrunk, x, y, intercept=True).r2()
    assert r2.r2_global > 0.2
    assert r2.shrinkage == pytest.approx(1 / 0.8, rel=0.15)


@pytest.mark.parametrize("intercept", [False, True])
def test_rescaled_share_is_that_of_a_second_regression(data, intercept):
    sae, x, y = data
    analysis = SAEErrorAnalysis(sae, x, y, intercept=intercept)
    g, b = analysis.shrinkage, sae.b_dec.detach()

    def rescaled(latents):
        return (b + g * (sae(latents)[0] - b)).detach()

    again = SAEErrorAnalysis(Plain(rescaled), x, y, intercept=intercept).r2()
    assert analysis.r2().r2_rescaled == pytest.approx(again.r2_global, abs=1e-4)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("robust", [False, True])
def test_norm_prediction_is_that_of_least_squares(data, intercept, robust):
    sae, x, y = data
    analysis = SAEErrorAnalysis(sae, x, y)
    got = analysis.norm_prediction(intercept=intercept, robust=robust)
    assert tuple(got) == VECTORS
    kept = np.argsort(x.var(0).numpy())[:-3] if robust else np.arange(D)
    sides = []
    for v in (x, y):
        error = (v - sae(v)[0].detach()).double().numpy()
        linear = v.double().numpy() @ analysis.B.weight.numpy().T
        recon, raw = v.double().numpy() - error, v.double().numpy()
        parts = (raw, recon, error, recon + error - linear, linear, error - linear)
        sides.append(np.stack([np.square(p[:, kept]).sum(1) for p in parts], 1))
    ones = [np.ones((len(v), 1)) if intercept else np.ones((len(v), 0)) for v in (x, y)]
    design, test = (np.concatenate([v.double().numpy(), o], 1) for v, o in zip((x, y), ones, strict=True))
    predicted = test @ np.linalg.lstsq(design, sides[0], rcond=None)[0]
    wanted = 1 - np.square(sides[1] - predicted).sum(0) / np.square(sides[1] - sides[1].mean(0)).sum(0)
    assert np.allclose(list(got.values()), wanted, atol=1e-4)


def test_near_binary_features_have_a_linear_squared_norm():
    """The rationale of the test: a sum of orthogonal on/off features has a squared norm linear in x."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    on = (torch.rand(2 * N, D, generator=generator) < 0.2).float()
    x = on @ (basis * torch.linspace(1, 3, D)[:, None])
    analysis = SAEErrorAnalysis(Plain(torch.zeros_like), x[:N], x[N:])
    assert analysis.norm_prediction()["x"] > 0.9999
    gaussian = torch.randn(2 * N, D, generator=generator)
    analysis = SAEErrorAnalysis(Plain(torch.zeros_like), gaussian[:N], gaussian[N:])
    assert analysis.norm_prediction(intercept=True)["x"] < 0.05


def test_baselines(data):
    sae, x, y = data
    analysis = SAEErrorAnalysis(sae, x, y)
    target = [(v - sae(v)[0].detach()).double().square().sum(1) for v in (x, y)]
    ids = torch.arange(N) % 7, torch.arange(N) % 8
    found = analysis.baselines(ids, (target[0], target[1]))
    assert found["model loss"] == pytest.approx(1.0)
    means = torch.stack([target[0][ids[0] == i].mean() for i in range(7)])
    predicted = torch.where(ids[1] < 7, means[ids[1].clamp_max(6)], target[0].mean())
    wanted = 1 - (target[1] - predicted).square().sum() / (target[1] - target[1].mean()).square().sum()
    assert found["token id"] == pytest.approx(float(wanted))
    norms = [v.double().square().sum(1) for v in (x, y)]
    slope, offset = np.polyfit(norms[0].numpy(), target[0].numpy(), 1)
    miss = target[1].numpy() - slope * norms[1].numpy() - offset
    assert found["norm of x"] == pytest.approx(
        1 - np.square(miss).sum() / float((target[1] - target[1].mean()).square().sum())
    )
    assert set(analysis.baselines()) == {"norm of x", "L0"}
    assert analysis.baselines(squared=False) != analysis.baselines()
    with pytest.raises(ValueError, match="token_ids has shape"):
        analysis.baselines((ids[0], ids[1][:-1]))


def test_a_constant_predictor_predicts_the_mean():
    y = torch.randn(50, dtype=torch.float64)
    assert abs(line_r2(torch.ones(50).double(), y, torch.ones(50).double(), y)) < 1e-12


def test_constant_dimensions_are_counted_and_left_out():
    x, y = activations(), activations(seed=1)
    for v in (x, y):
        v[:, 4] = 0.0
    r2 = SAEErrorAnalysis(Plain(lambda latents: 0.5 * latents), x, y).r2()
    assert r2.constant_dims == 1
    assert r2.r2_dim_mean > 0.99


def test_stores_batches_and_low_precision_give_the_same_numbers(data, tmp_path):
    sae, x, y = data
    whole = SAEErrorAnalysis(sae, x, y).fvu()
    small = SAEErrorAnalysis(sae, Rows(x, block=77), Rows(y, block=501)).fvu()
    assert small.nonlinear == pytest.approx(whole.nonlinear, rel=1e-9)
    half, other = x.bfloat16(), y.bfloat16()
    low = SAEErrorAnalysis(sae, half, other).fvu()
    assert low.sae == pytest.approx(SAEErrorAnalysis(sae, half.float(), other.float()).fvu().sae)


def test_bad_input_is_named(data):
    sae, x, y = data
    with pytest.raises(ValueError, match="at least 60"):
        SAEErrorAnalysis(sae, x[:59], y)
    assert SAEErrorAnalysis(sae, x[:59], y, ridge=1e-3).fvu().sae > 0
    broken = y.clone()
    broken[1234, 5] = torch.inf
    with pytest.raises(ValueError, match="token 1234"):
        SAEErrorAnalysis(sae, x, broken).fvu()
    with pytest.raises(ValueError, match="same width"):
        SAEErrorAnalysis(sae, x, y[:, :5])
    with pytest.raises(ValueError, match="same shape"):
        SAEErrorAnalysis(Plain(lambda latents: latents[:, :5]), x, y)
    with pytest.raises(ValueError, match="no variance"):
        SAEErrorAnalysis(sae, x, torch.ones(10, D)).fvu()


def test_regression_on_copies_of_a_channel_is_finite():
    x = torch.randn(500, 3)
    fit = LeastSquares(4, 1)
    fit.update(torch.cat([x, x[:, :1]], 1), x[:, :1])
    found = fit.solve()
    assert found.weight[0].sum() == pytest.approx(1.0, abs=1e-6)
    empty = LeastSquares(2, 1)
    empty.update(torch.zeros(20, 2), torch.zeros(20, 1))
    with pytest.raises(ValueError, match="all 0"):
        empty.solve()


def test_any_module_with_encode_and_decode_will_do(data):
    _, x, y = data

    class Principal(nn.Module):
        def __init__(self):
            super().__init__()
            self.basis = torch.linalg.eigh(torch.cov(x.T)).eigenvectors[:, -4:]

        def encode(self, v):
            return v @ self.basis

        def decode(self, latents):
            return latents @ self.basis.T

    # A projection's error is linear in x by definition.
    assert SAEErrorAnalysis(Principal(), x, y).r2().r2_global > 0.9999
    assert isinstance(TopKSAE(4, 8, 2), nn.Module)
