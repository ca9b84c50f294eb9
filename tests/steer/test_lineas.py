# SPDX-License-Identifier: Apache-2.0
"""LinEAS against closed forms, finite differences and a numerical minimiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from steer_models import one_place, source, target, tiny_llama

from tilewright.steer import LinEAS, steer
from tilewright.steer.baselines.closed_forms import sorted_least_squares
from tilewright.steer.lineas import LinEASConfig, distributional_losses, fit, prox_sparse_group
from tilewright.steer.lineas.method import Training
from tilewright.steer.problem import Problem


def test_one_layer_converges_to_the_closed_form():
    random = torch.Generator().manual_seed(1)
    z = torch.randn(32, 12, generator=random) * 0.8 + 0.3
    v = torch.randn(32, 12, generator=random) * 1.3 - 0.5
    model, texts, wanted = one_place(z, v)
    maps = steer(model, source=texts, target=wanted, modules="place", steps=600).maps["place"]
    closed = sorted_least_squares(z, v)
    assert bool((closed.weight > 0).all())
    mine, best = (float(distributional_losses({"p": one(z)}, {"p": v})["p"]) for one in (maps, closed))
    assert best <= mine <= best * (1 + 1e-3)
    assert torch.allclose(maps.weight, closed.weight, atol=0.02)


def test_one_text_is_the_mean_shift():
    z, v = torch.randn(1, 6), torch.randn(1, 6)
    model, texts, wanted = one_place(z, v)
    one = steer(model, source=texts, target=wanted, modules="place", steps=300).maps["place"]
    assert torch.allclose(one(z), v, atol=1e-3)


def test_gradients_flow_through_later_layers():
    """Of the total loss by an early map's parameters, against central differences in float64."""
    model = tiny_llama(dtype=torch.float64)
    for layer in model.model.layers:
        # transformers' norm rounds to float32, which finite differences would see
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = torch.nn.RMSNorm(32, eps=1e-6, dtype=torch.float64)
            norm.load_state_dict(getattr(layer, name).state_dict())
            setattr(layer, name, norm)
    problem = Problem.of(model, source(5), target(5))
    training = Training(problem, LinEASConfig())
    training.w = {n: w.detach().double().requires_grad_() for n, w in training.w.items()}
    training.b = {n: b.detach().double().requires_grad_() for n, b in training.b.items()}
    first = "model.layers.0.input_layernorm"
    with training.ready() as run:

        def total() -> torch.Tensor:
            return torch.stack(list(training._losses(run).values())).sum()

        gradient = torch.autograd.grad(total(), [training.w[first], training.b[first]])
        with torch.no_grad():
            for parameter, slopes in zip((training.w[first], training.b[first]), gradient, strict=True):
                for j in (0, 7, 31):
                    values = []
                    for step in (1e-6, -1e-6):
                        parameter[j] += step
                        values.append(float(total()))
                        parameter[j] -= step
                    numeric = (values[0] - values[1]) / 2e-6
                    # Central differences: truncation of order step^2, cancellation of order 2^-52 loss / step.
                    assert float(slopes[j]) == pytest.approx(numeric, rel=1e-4, abs=1e-7 * values[0])
        later = [n for n in training.target if n != first]
        own = torch.autograd.grad(training._losses(run)[first], training.b[first])[0]
        assert len(later) == 5
        assert not torch.allclose(own, gradient[1])


@pytest.mark.parametrize("last", ["norm", "block"])
def test_checkpointing_gives_the_same_maps(last):
    model = tiny_llama()
    options = {"source": source(6), "target": target(6), "modules": last, "steps": 4}
    plain = steer(model, checkpoint=False, **options)
    saving = steer(model, checkpoint=True, **options)
    for name, one in plain.maps.items():
        assert torch.equal(one.weight, saving.maps[name].weight)
        assert torch.equal(one.bias, saving.maps[name].bias)
    assert all("forward" not in vars(m) for m in model.modules())


def test_training_is_deterministic():
    model = tiny_llama()
    options = {"source": source(16), "target": target(16), "steps": 5}
    assert steer(model, **options).report["loss"] == steer(model, **options).report["loss"]


def test_training_reaches_the_closed_forms():
    """On training texts of a model with random weights layers hardly depend on each other: Lin-AcT, layer after layer,
    is near the least loss there, which training must reach from the identity."""
    model = tiny_llama(layers=2)
    options = {"source": source(16), "target": target(16)}
    problem = Problem.of(model, source(16), target(16))
    wanted = problem.pooled(problem.target)

    def total(maps, strength: float = 1.0) -> float:
        with maps.transform(model, strength):
            return float(sum(distributional_losses(problem.pooled(problem.source), wanted).values()))

    maps = steer(model, steps=200, **options)
    sequential, at_once = (steer(model, "lin_act", sequential=s, **options) for s in (True, False))
    assert total(maps) < 1.05 * min(total(at_once), total(sequential))
    assert total(sequential) < 0.5 * total(maps, 0.0)


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.model.norm.requires_grad_(False)
    steer(model, source=source(4), target=target(4), steps=2)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.model.norm.parameters()] == [False]
    assert model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_large_gamma_leaves_the_identity_and_a_small_one_some_support(optimizer):
    model = tiny_llama()
    options = {"source": source(12), "target": target(12), "steps": 30, "lr": 0.02, "optimizer": optimizer}
    assert steer(model, gamma=100.0, **options).support() == 0.0
    dense = steer(model, **options)
    assert dense.support() == 1.0
    some = steer(model, gamma=0.2, **options).support()
    assert 0.0 < some < 1.0


def test_thresholds_follow_the_step_size_unless_told_otherwise():
    model = tiny_llama()
    options = {"source": source(12), "target": target(12), "steps": 10, "lr": 0.02, "gamma": 0.05}
    scaled, printed = steer(model, **options), steer(model, prox_lr=False, **options)
    assert printed.support() < scaled.support()
    ended = steer(model, final_threshold=True, **options)
    assert ended.support() <= scaled.support()


@pytest.mark.parametrize("metric", [None, [1.0] * 6, [0.01, 0.3, 1.0, 2.0, 40.0, 5.0]])
@pytest.mark.parametrize(("t1", "tg"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.2, 0.5), (0.4, 9.0), (0.4, 90.0)])
def test_prox_is_the_minimiser(t1, tg, metric):
    from scipy.optimize import minimize

    v = np.random.default_rng(2).normal(size=6)
    c = np.ones(6) if metric is None else np.array(metric)
    u = prox_sparse_group(torch.from_numpy(v), t1, tg, None if metric is None else torch.from_numpy(c)).numpy()

    def objective(u) -> float:
        return 0.5 * np.sum(c * (u - v) ** 2) + t1 * np.sum(np.abs(u)) + tg * np.linalg.norm(u)

    def smooth(parts) -> float:
        u = parts[:6] - parts[6:]
        return 0.5 * np.sum(c * (u - v) ** 2) + t1 * np.sum(parts) + tg * np.sqrt(np.sum(u**2) + 1e-18)

    def slopes(parts) -> np.ndarray:
        u = parts[:6] - parts[6:]
        both = c * (u - v) + tg * u / np.sqrt(np.sum(u**2) + 1e-18)
        return np.concatenate([both + t1, t1 - both])

    start = np.concatenate([np.maximum(v, 0), np.maximum(-v, 0)])
    options = {"maxiter": 20000, "maxfun": 100000, "ftol": 1e-16, "gtol": 1e-12}
    least = minimize(smooth, start, jac=slopes, bounds=[(0, None)] * 12, method="L-BFGS-B", options=options)
    assert objective(u) <= least.fun + 1e-6
    if least.fun < objective(np.zeros(6)) - 1e-3:
        # Strong convexity with c: squared distances are at most 2 (objective - least) / c.
        off = u - (least.x[:6] - least.x[6:])
        assert 0.5 * np.sum(c * off**2) <= 1e-6
    else:
        assert not u.any()


def test_prox_in_a_metric_meets_the_conditions_of_a_minimum():
    """Zero lies in the subdifferential, in float64, at a length of a real group."""
    random = np.random.default_rng(5)
    v, c = random.normal(size=576), np.exp(random.normal(size=576) * 3)
    t1, tg = 0.3, 5.0
    u = prox_sparse_group(torch.from_numpy(v), t1, tg, torch.from_numpy(c)).numpy()
    slope = c * (u - v) + tg * u / np.linalg.norm(u)
    moved = u != 0
    assert 0 < moved.sum() < 576
    assert np.abs(slope + t1 * np.sign(u))[moved].max() < 1e-9
    assert np.abs(slope[~moved]).max() <= t1 * (1 + 1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_gamma_means_the_same_under_both_optimizers(optimizer):
    """One place without interaction: where training ends, a coordinate is at rest exactly if its slope is below
    gamma, whatever sizes the optimizer gave the steps."""
    random = torch.Generator().manual_seed(4)
    z, v = (torch.randn(16, 12, generator=random) for _ in range(2))
    v = v + torch.linspace(0.0, 2.0, 12)
    model, texts, wanted = one_place(z, v)
    options = {"modules": "place", "steps": 1500, "lr": 0.05, "gamma": 0.8, "lambda_g": 0.0}
    found = steer(model, source=texts, target=wanted, optimizer=optimizer, **options).maps["place"]
    w, b = (p.detach().clone().requires_grad_() for p in (found.weight, found.bias))
    loss = distributional_losses({"p": z * w + b}, {"p": v})["p"]
    for parameter, start, slope in zip((w, b), (1.0, 0.0), torch.autograd.grad(loss, (w, b)), strict=True):
        moved = parameter.detach() != start
        assert 0 < int(moved.sum()) < 12
        assert float((slope + 0.8 * (parameter.detach() - start).sign())[moved].abs().max()) < 0.02
        assert float(slope[~moved].abs().max()) <= 0.8 + 0.02


def test_prox_of_nothing_and_bad_thresholds():
    assert prox_sparse_group(torch.zeros(4), 0.1, 0.1).tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="t1 = -1"):
        prox_sparse_group(torch.ones(2), -1, 0)
    with pytest.raises(ValueError, match="metric"):
        prox_sparse_group(torch.ones(2), 0.1, 0.1, torch.tensor([1.0, 0.0]))


def test_a_step_size_that_diverges_is_halved():
    model = tiny_llama()
    maps = steer(model, source=source(8), target=target(8), steps=60, lr=50.0)
    assert maps.report["lr_halvings"] > 0
    assert all(np.isfinite(maps.report["loss"]))


def test_batches_of_texts_are_drawn_from_the_seed():
    model = tiny_llama()
    options = {"source": source(12), "target": target(9), "steps": 4, "batch_size": 4}
    first, again, other = (steer(model, seed=s, **options).report["loss"] for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_loss_normalised_by_the_targets_spread():
    z = {"small": torch.randn(8, 4), "large": torch.randn(8, 4)}
    v = {name: torch.randn(8, 4) for name in z}
    plain = distributional_losses(z, v, "std")
    scaled = distributional_losses({n: 100 * x for n, x in z.items()}, {n: 100 * x for n, x in v.items()}, "std")
    for name in z:
        assert float(scaled[name]) == pytest.approx(float(plain[name]), rel=1e-5)


def test_the_estimator_is_the_function():
    model = tiny_llama()
    estimator = LinEAS(model, layers=range(2)).fit(source(6), target(6), steps=3)
    maps = steer(model, source=source(6), target=target(6), layers=range(2), steps=3)
    assert estimator.loss_history_ == maps.report["loss"]
    assert set(estimator.layers_) == set(maps.maps)
    assert estimator.support() == maps.support()
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad(), estimator.transform(0.5):
        mine = model(ids).logits
    with torch.no_grad(), maps.transform(model, 0.5):
        assert torch.equal(model(ids).logits, mine)


def test_fit_is_public():
    problem = Problem.of(tiny_llama(), source(3), target(3))
    assert fit(problem, LinEASConfig(steps=1)).method == "lineas"
