# SPDX-License-Identifier: Apache-2.0
"""What an SAE's error costs a model, what predicts it, and the simulation with known errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tilewright.capture import stream
from tilewright.inspect.sae import SAEConfig, SAETrainer
from tilewright.inspect.sae_dark_matter import (
    LinearMap,
    SAEErrorAnalysis,
    component_prediction,
    downstream_loss,
    introduced_error_simulation,
)

D, V = 10, 23


class TinyLM(nn.Module):
    """Two residual layers over tokens; position t sees token t alone, so that losses are easy to check."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D)
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.head = nn.Linear(D, V)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.first(x).tanh()
        return self.head(x + self.second(x))


class Rough:
    """A bad coder: recon = 0.7 x rounded to halves."""

    def encode(self, x):
        return (1.4 * x).round() / 2

    def decode(self, latents):
        return latents


def ids(count, length=12, seed=0):
    return list(torch.randint(0, V, (count, 2, length), generator=torch.Generator().manual_seed(seed)))


def nll(model, batches, skip, change):
    total, count = 0.0, 0
    for batch in batches:
        x = model.embed(batch)
        y = model.first(x)
        y[:, skip:] = change(y[:, skip:])
        x = x + y.tanh()
        logits = model.head(x + model.second(x))
        some = nn.functional.cross_entropy(
            logits[:, skip:-1].reshape(-1, V).double(), batch[:, skip + 1 :].reshape(-1), reduction="sum"
        )
        total, count = total + float(some), count + batch[:, skip + 1 :].numel()
    return total / count


@torch.no_grad()
def test_downstream_loss_replaces_late_positions_alone():
    model, sae, batches = TinyLM(), Rough(), ids(3)
    B = LinearMap(torch.randn(D, D).double() / 10, torch.randn(D).double() / 10)
    found = downstream_loss(model, "first", sae, B, batches, skip=4)

    def recon(x):
        return sae.decode(sae.encode(x))

    wanted = {
        "original": nll(model, batches, 4, lambda x: x),
        "sae": nll(model, batches, 4, recon),
        "sae+linear": nll(model, batches, 4, lambda x: recon(x) + B(x)),
        "sae+nonlinear": nll(model, batches, 4, lambda x: x - B(x)),
    }
    assert found.tokens == 3 * 2 * 7
    assert found.loss == pytest.approx(wanted, rel=1e-6)
    lost = wanted["sae"] - wanted["original"]
    assert found.recovered["linear"] == pytest.approx((wanted["sae"] - wanted["sae+linear"]) / lost, rel=1e-4)
    assert not model.first._forward_hooks


def test_downstream_loss_needs_tokens_to_predict():
    zero = LinearMap.zero(D, D)
    with pytest.raises(ValueError, match="more than skip"):
        downstream_loss(TinyLM(), "first", Rough(), zero, ids(1), skip=11)
    with pytest.raises(ValueError, match="empty"):
        downstream_loss(TinyLM(), "first", Rough(), zero, [])


def test_component_regressions_are_those_of_least_squares():
    model = TinyLM()
    train, test = ids(20), ids(20, seed=1)
    sites = ["embed", "first", "second"]
    rows = [
        {k: torch.cat([part[f"{k}@output"] for part in stream(model, b, sites)]) for k in sites} for b in (train, test)
    ]
    one = {k: SAEErrorAnalysis(Rough(), rows[0][k], rows[1][k]) for k in sites}

    def batches(side):
        return ({k: rows[side][k][i : i + 97] for k in sites} for i in range(0, len(rows[side]["embed"]), 97))

    grid = component_prediction(
        one["second"], {"embed": one["embed"], "first": one["first"]}, batches(0), batches(1), target_name="second"
    )
    assert set(grid) == {"embed", "first"}
    for part in ("x", "nonlinear"):
        inputs = [np.c_[one["first"].parts(r["first"])[part].double().numpy(), np.ones(len(r["first"]))] for r in rows]
        for name in ("error", "nonlinear"):
            y = [one["second"].parts(r["second"])[name].double().numpy() for r in rows]
            missed = y[1] - inputs[1] @ np.linalg.lstsq(inputs[0], y[0], rcond=None)[0]
            wanted = 1 - np.square(missed).sum() / np.square(y[1] - y[1].mean(0)).sum()
            assert grid["first"][part][name] == pytest.approx(wanted, abs=1e-5)
    # The last layer is a linear function of the first residual stream's tokens, its linear error therefore too.
    with pytest.raises(ValueError, match="lacks 'first'"):
        component_prediction(
            one["second"], {"first": one["first"]}, [{"second": rows[0]["second"]}], [], target_name="second"
        )


@pytest.fixture(scope="module")
def trained():
    generator = torch.Generator().manual_seed(0)
    basis = nn.functional.normalize(torch.randn(40, 24, generator=generator), dim=1)
    on = (torch.rand(12_000, 40, generator=generator) < 0.1).float()
    x = on * (0.5 + torch.rand(on.shape, generator=generator)) @ basis
    return SAETrainer(SAEConfig(width=64, k=5, steps=400, batch=256, lr=4e-3)).fit(x), x


@pytest.mark.parametrize("seed", [0, 1])
def test_simulated_errors_are_told_apart(trained, seed):
    sae, x = trained
    found = introduced_error_simulation(sae, x, drop=0.2, seed=seed)
    assert found.linear.shape == found.nonlinear.shape == (5, 5)
    (dense_linear, dense_nonlinear), (introduced_linear, introduced_nonlinear) = found.correlations.tolist()
    assert dense_linear >= 0.8
    assert introduced_nonlinear >= 0.8
    assert abs(dense_nonlinear) <= 0.4
    assert abs(introduced_linear) <= 0.4
    assert 0 <= found.idempotence < 0.2


def test_without_noise_dropped_latents_are_all_the_error(trained):
    sae, x = trained
    none, half = (introduced_error_simulation(sae, x, drop=q) for q in (0.0, 0.5))
    start = [float(s.linear[0, 0] + s.nonlinear[0, 0]) for s in (none, half)]
    assert start[0] == pytest.approx(none.idempotence, rel=0.2)
    assert start[1] > start[0] + 0.05


@pytest.mark.parametrize("change", [{"drop": 1.0}, {"drop": -0.1}, {"dense": (1.0,)}, {"introduced": ()}])
def test_impossible_simulations_are_named(trained, change):
    with pytest.raises(ValueError, match="need 0 <= drop < 1"):
        introduced_error_simulation(*trained, **change)


def test_saes_learn_from_parts_of_an_error(trained):
    sae, x = trained
    analysis = SAEErrorAnalysis(sae, x[:6000], x[6000:])
    rows = analysis.train.mapped(analysis.nonlinear_error)
    second = SAETrainer(SAEConfig(width=64, k=5, steps=100, batch=256, lr=4e-3)).fit(rows)
    rest = analysis.nonlinear_error(x[6000:])
    assert float((rest - second(rest)[0].detach()).square().sum()) < float(rest.square().sum())
