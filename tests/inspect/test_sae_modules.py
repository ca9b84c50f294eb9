# SPDX-License-Identifier: Apache-2.0
"""The kinds of SAE: JumpReLU's pseudo-gradients, thresholds, folding, and files as SAELens writes them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tilewright.inspect.sae import BatchTopKSAE, JumpReLUSAE, SAEConfig, TopKSAE, load_sae, save_sae
from tilewright.inspect.sae.losses import batch_loss
from tilewright.inspect.sae.module import JumpReLU, Step

E = 0.2


def test_jumprelu_gradients_are_those_of_the_formulas():
    pi = torch.cat([torch.randn(500, dtype=torch.float64), torch.tensor([0.5, 0.59, 0.61, 0.41, 0.39]).double()])
    theta = torch.cat([torch.rand(500, dtype=torch.float64), torch.full((5,), 0.5).double()])
    upstream = torch.randn(505, dtype=torch.float64)
    p, t = pi.clone().requires_grad_(), theta.clone().requires_grad_()
    value = JumpReLU.apply(p, t, E)
    (value * upstream).sum().backward()
    kernel = ((pi - theta) / E).abs() < 0.5
    assert torch.equal(value.detach(), torch.where(pi > theta, pi, 0.0))
    assert torch.equal(p.grad, torch.where(pi > theta, upstream, 0.0))
    assert torch.allclose(t.grad, -upstream * theta / E * kernel, rtol=1e-14, atol=0)
    assert kernel.sum() > 20
    p, t = pi.clone().requires_grad_(), theta.clone().requires_grad_()
    count = Step.apply(p, t, E)
    (count * upstream).sum().backward()
    assert torch.equal(count.detach(), (pi > theta).double())
    assert p.grad is None or not p.grad.any()
    assert torch.allclose(t.grad, -upstream / E * kernel, rtol=1e-14, atol=0)


@pytest.mark.parametrize("width", [12, 200])
@pytest.mark.parametrize("low", [0.01, 1.5])
def test_jumprelu_loss_equals_dense_pseudo_gradients(width, low):
    """From nearly all latents active (dense products) to few (gathered rows)."""
    torch.manual_seed(1)
    sae = JumpReLUSAE(6, width, bandwidth=E, threshold=low).double().train()
    with torch.no_grad():
        sae.b_enc.add_(0.2 * torch.randn_like(sae.b_enc))
        sae.W_enc.mul_(2)
    x = torch.randn(30, 6, dtype=torch.float64)
    config = SAEConfig(kind="jumprelu", width=width, sparsity=0.3, sparsity_warmup=1)
    loss = batch_loss(sae, x, config, 0)
    loss.total.backward()
    pi = x @ sae.W_enc.detach().T + sae.b_enc.detach()
    theta = sae.log_threshold.detach().exp()
    f = pi * (pi > theta)
    residual = f @ sae.W_dec.detach() + sae.b_dec.detach() - x
    expected = (residual.square().sum() + 0.3 * (pi > theta).double().sum()) / 30
    assert float(loss.total.detach()) == pytest.approx(float(expected), rel=1e-12)
    d_f = 2 / 30 * residual @ sae.W_dec.detach().T
    window = (((pi - theta) / E).abs() < 0.5).double()
    d_theta = (-(theta / E) * window * d_f - 0.3 / 30 / E * window).sum(0)
    wanted = {
        "W_enc": (d_f * (pi > theta)).T @ x,
        "b_enc": (d_f * (pi > theta)).sum(0),
        "W_dec": 2 / 30 * f.T @ residual,
        "b_dec": 2 / 30 * residual.sum(0),
        "log_threshold": d_theta * theta,
    }
    for name, gradient in wanted.items():
        assert torch.allclose(getattr(sae, name).grad, gradient, rtol=1e-10, atol=1e-12), name
    assert loss.l0 == pytest.approx(float((f != 0).sum()) / 30)


def test_batchtopk_learns_one_threshold_for_inference():
    sae = BatchTopKSAE(6, 40, 3, momentum=0.5).train()
    smallest = []
    for seed in range(3):
        torch.manual_seed(seed)
        latents = sae(torch.randn(50, 6))[1].detach()
        smallest.append(float(latents[latents > 0].min()))
        assert int((latents > 0).sum()) == 150
    expected = smallest[0]
    for value, weight in zip(smallest[1:], (0.5, 0.5), strict=True):
        expected += weight * (value - expected)
    assert float(sae.threshold) == pytest.approx(expected, rel=1e-6)
    sae.eval()
    latents = sae.encode(torch.randn(200, 6))
    assert float(latents[latents > 0].min()) > float(sae.threshold)
    assert len(set((latents > 0).sum(1).tolist())) > 1


@pytest.mark.parametrize("make", [TopKSAE, BatchTopKSAE, JumpReLUSAE])
def test_folding_gives_the_same_function_of_raw_activations(make):
    sae = make(6, 40).double() if make is JumpReLUSAE else make(6, 40, 3).double()
    sae.eval()
    with torch.no_grad():
        for p in (sae.b_enc, sae.b_dec):
            p.copy_(torch.randn_like(p))
        if make is BatchTopKSAE:
            sae.threshold.fill_(0.4)
    mean, scale = torch.randn(6, dtype=torch.float64), 3.7
    raw = torch.randn(25, 6, dtype=torch.float64) * 2 + mean
    recon, latents = (t.detach() for t in sae((raw - mean) * scale))
    sae.fold(mean, scale)
    folded, fewer = (t.detach() for t in sae(raw))
    assert torch.allclose(folded, recon / scale + mean, rtol=1e-10, atol=1e-10)
    assert torch.allclose(fewer, latents / scale, rtol=1e-10, atol=1e-10)


def made(kind):
    if kind is JumpReLUSAE:
        sae = JumpReLUSAE(6, 40, metadata={"hook_name": "model.layers.3"})
        with torch.no_grad():
            sae.log_threshold.copy_(torch.linspace(-3, 0, 40))
    else:
        sae = kind(6, 40, 3, metadata={"hook_name": "model.layers.3"})
    if kind is BatchTopKSAE:
        sae(torch.randn(30, 6))
    return sae.eval()


@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE, JumpReLUSAE])
def test_files_give_back_the_same_sae(kind, tmp_path):
    sae = made(kind)
    save_sae(sae, tmp_path / "sae")
    back = load_sae(tmp_path / "sae")
    assert type(back) is kind
    assert not back.training
    assert back.metadata == {"hook_name": "model.layers.3"}
    x = torch.randn(20, 6)
    # exp(log(theta)) moves a threshold by an ulp or two.
    assert torch.allclose(back.encode(x), sae.encode(x), rtol=1e-6, atol=1e-6)
    save_sae(back, tmp_path / "sae")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae"]


@pytest.mark.parametrize(("kind", "architecture"), [(TopKSAE, "topk"), (BatchTopKSAE, "jumprelu")])
def test_files_have_the_layout_of_saelens(kind, architecture, tmp_path):
    sae = made(kind)
    save_sae(sae, tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    tensors = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert config["architecture"] == architecture
    assert (config["d_in"], config["d_sae"]) == (6, 40)
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        "W_enc": [6, 40],
        "W_dec": [40, 6],
        "b_enc": [40],
        "b_dec": [6],
    } | ({"threshold": [40]} if architecture == "jumprelu" else {})
    # The inference rule that SAELens applies to such a file.
    x = torch.randn(20, 6)
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    if architecture == "topk":
        assert config["k"] == 3
        top = pre.topk(3, dim=-1)
        latents = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    else:
        latents = pre.relu() * (pre > tensors["threshold"])
    assert torch.allclose(sae.encode(x), latents, rtol=1e-5, atol=1e-6)


def plain_tensors(norm=1.0):
    return {
        "W_enc": torch.randn(6, 10),
        "W_dec": norm * torch.randn(10, 6),
        "b_enc": torch.randn(10),
        "b_dec": torch.randn(6),
    }


def test_plain_files_are_taken_for_what_their_tensors_say(tmp_path):
    tensors, x = plain_tensors(), torch.randn(8, 6)
    file = tmp_path / "plain.safetensors"
    save_file(tensors, file)
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    assert torch.allclose(load_sae(file).encode(x), pre.relu(), rtol=1e-5, atol=1e-6)
    assert ((load_sae(file, k=2).encode(x) > 0).sum(1) <= 2).all()
    save_file(tensors | {"threshold": torch.full((10,), 0.7)}, file)
    assert torch.allclose(load_sae(file).encode(x), pre * (pre > 0.7), rtol=1e-5, atol=1e-6)


def test_rescaled_activations_are_folded_on_load(tmp_path):
    tensors, x = plain_tensors(2.0), torch.randn(8, 6)
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    config = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True, "normalize_activations": "none"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae = load_sae(tmp_path)
    norm = tensors["W_dec"].norm(dim=1)
    top = (((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]) * norm).topk(4, dim=-1)
    latents = torch.zeros(8, 10).scatter_(-1, top.indices, top.values.relu())
    recon = (latents / norm) @ tensors["W_dec"] + tensors["b_dec"]
    assert torch.allclose(sae(x)[0], recon, rtol=1e-4, atol=1e-5)


def broken(**change):
    return {name: t for name, t in {**plain_tensors(), **change}.items() if t is not None}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (broken(W_dec=None), {}, "W_dec is missing"),
        (broken(b_enc=torch.zeros(9)), {}, "b_enc has shape"),
        (broken(b_dec=torch.full((6,), torch.nan)), {}, "NaN"),
        (broken(), {"architecture": "gated"}, "gated"),
        (broken(), {"architecture": "topk"}, "without k"),
        (broken(), {"architecture": "jumprelu"}, "without threshold"),
        (broken(), {"architecture": "topk", "k": 2, "normalize_activations": "layer_norm"}, "layer_norm"),
    ],
)
def test_broken_files_are_explained(tensors, config, message, tmp_path):
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_sae(tmp_path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_sae(tmp_path / "nothing")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_sae(tmp_path / "text.safetensors")
    with pytest.raises(FileExistsError, match="holds no SAE"):
        save_sae(TopKSAE(6, 40, 3), tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKSAE(6, 40, 0), "k=0"),
        (lambda: TopKSAE(6, 40, 41), "k=41"),
        (lambda: TopKSAE(0, 40, 1), "d_in=0"),
        (lambda: BatchTopKSAE(6, 40, 3, momentum=1.0), "momentum"),
        (lambda: JumpReLUSAE(6, 40, bandwidth=0.0), "bandwidth"),
    ],
)
def test_impossible_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
