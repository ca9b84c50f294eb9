# SPDX-License-Identifier: Apache-2.0
"""Sums over active latents alone equal dense masked autograd, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.inspect.sae import BatchTopKSAE, Codes, SAEConfig, Support, TopKSAE
from tilewright.inspect.sae.codes import chosen_preactivations, rows_by_latent, weighted_rows
from tilewright.inspect.sae.losses import auxk_loss, batch_loss, variance
from tilewright.inspect.sae.module import mask_support, top_support

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def close(got, wanted, terms=1):
    """Equal up to float64 rounding of sums of so many terms."""
    assert got.shape == wanted.shape
    if wanted.numel():
        bound = 4 * terms * torch.finfo(torch.float64).eps * float(wanted.abs().max().clamp_min(1))
        assert float((got - wanted).abs().max()) <= bound


def sae_of(kind=TopKSAE, d=6, width=40, k=3, seed=0):
    torch.manual_seed(seed)
    sae = kind(d, width, k).double()
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return sae


def gradients(sae, loss):
    sae.zero_grad()
    loss.backward()
    return {name: getattr(sae, name).grad.clone() for name in PARAMETERS}


def dense_preactivations(sae, x):
    return (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc


def topk_mask(pre, k):
    return torch.zeros_like(pre).scatter_(1, pre.detach().topk(k, 1).indices, 1.0)


@pytest.mark.parametrize(("width", "k"), [(40, 1), (40, 2), (40, 39), (5, 5)])
def test_topk_equals_dense_masked_autograd(width, k):
    sae = sae_of(width=width, k=k)
    x = torch.randn(17, 6, dtype=torch.float64)
    got = batch_loss(sae, x, SAEConfig(width=width, k=k), 0)
    ours = gradients(sae, got.total)
    pre = dense_preactivations(sae, x)
    latents = pre.relu() * topk_mask(pre, k)
    recon = latents @ sae.W_dec + sae.b_dec
    loss = (recon - x).square().sum() / (x - x.mean(0)).square().sum()
    theirs = gradients(sae, loss)
    close(got.total.detach(), loss.detach(), 200)
    for name in PARAMETERS:
        close(ours[name], theirs[name], 200)
    close(sae.encode(x).detach(), latents.detach(), 20)
    close(sae(x)[0].detach(), recon.detach(), 20)


def test_batchtopk_equals_dense_masked_autograd():
    sae = sae_of(BatchTopKSAE).train()
    x = torch.randn(17, 6, dtype=torch.float64)
    ours = gradients(sae, batch_loss(sae, x, SAEConfig(kind="batchtopk", width=40, k=3), 0).total)
    pre = dense_preactivations(sae, x)
    smallest = pre.detach().flatten().sort(descending=True).values[3 * 17 - 1]
    latents = pre * (pre >= smallest) * (pre > 0)
    recon = latents @ sae.W_dec + sae.b_dec
    theirs = gradients(sae, (recon - x).square().sum() / variance(x))
    for name in PARAMETERS:
        close(ours[name], theirs[name], 200)
    assert float(sae.threshold) == float(smallest)


def test_auxiliary_and_multi_losses_equal_dense_autograd():
    sae = sae_of()
    x = torch.randn(17, 6, dtype=torch.float64)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[1, 5, 6, 20, 33]] = True
    config = SAEConfig(width=40, k=3, auxk_alpha=1 / 32, multi_topk=True)
    got = batch_loss(sae, x, config, 0, dead)
    ours = gradients(sae, got.total)
    pre = dense_preactivations(sae, x)
    recon = pre.relu() * topk_mask(pre, 3) @ sae.W_dec + sae.b_dec
    wide = pre.relu() * topk_mask(pre, 12) @ sae.W_dec + sae.b_dec
    alive = pre.masked_fill(~dead, -torch.inf)
    chosen = torch.zeros_like(pre).scatter_(1, alive.detach().topk(3, 1).indices, 1.0)
    aux = ((pre.relu() * chosen) @ sae.W_dec - (x - recon).detach()).square().sum()
    total = (recon - x).square().sum() + (wide - x).square().sum() / 8 + aux / 32
    theirs = gradients(sae, total / variance(x))
    for name in PARAMETERS:
        close(ours[name], theirs[name], 400)
    assert got.auxk == pytest.approx(float(aux.detach() / variance(x)))


def test_auxiliary_loss_is_scaled_when_few_latents_are_dead():
    sae = sae_of()
    x = torch.randn(9, 6, dtype=torch.float64)
    pre = sae.preactivations(x).detach()
    dead = torch.zeros(40, dtype=torch.bool)
    dead[7] = True
    residual = torch.randn_like(x)
    seen = pre[:, 7:8].relu() @ sae.W_dec[7:8]
    expected = (seen - residual).square().sum() / 3
    close(auxk_loss(sae, x, pre, residual, dead).detach(), expected.detach(), 100)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 90),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_ragged_sums_equal_dense_products(tokens, width, share, seed):
    """Tokens without any active latent, latents that no token uses, crowded and sparse, no token at all."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, width, generator=generator) < share
    support = mask_support(mask)
    value = torch.randn(len(support.index), dtype=torch.float64, generator=generator, requires_grad=True)
    table = torch.randn(width, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(tokens, 5, dtype=torch.float64, generator=generator)
    out = weighted_rows(value, table, support)
    got = torch.autograd.grad((out * weight).sum(), [value, table], allow_unused=True)
    dense = torch.zeros(tokens, width, dtype=torch.float64)
    dense = dense.masked_scatter(mask, value)
    wanted = torch.autograd.grad((dense @ table * weight).sum(), [value, table], allow_unused=True)
    close(out.detach(), (dense @ table).detach(), width)
    for one, other in zip(got, wanted, strict=True):
        if other is not None and one is not None:
            close(one, other, 50)
    close(rows_by_latent(support, value.detach(), weight), dense.detach().T @ weight, 50)
    assert torch.equal(Codes(support, value.detach()).l0(), (dense != 0).sum(1))


@pytest.mark.parametrize("width", [3, 60])
def test_gradients_are_those_of_finite_differences(width):
    support = Support(torch.tensor([2, 0, 1, 2]), torch.tensor([0, 2, 2, 4]), width)
    x, weight, bias, center = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (width, 4), (width,), (4,))
    )

    def f(x, weight, bias, center):
        pre = ((x - center) @ weight.T + bias).detach()
        return weighted_rows(chosen_preactivations(pre, x, weight, bias, center, support), weight, support)

    assert torch.autograd.gradcheck(f, (x, weight, bias, center))


def test_top_support_takes_all_when_there_are_fewer_than_k():
    support = top_support(torch.tensor([[1.0, 3.0]]), 5)
    assert support.index.tolist() == [1, 0]
    assert support.offsets.tolist() == [0, 2]


@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE])
def test_low_precision_and_strided_activations_are_cast(kind, poisoned):
    sae = kind(6, 40, 3).eval()
    base = torch.randn(12, 6, 2)
    strided = base.transpose(0, 1)[:, :, 0].T
    assert not strided.is_contiguous()
    assert torch.equal(sae.encode(strided), sae.encode(strided.contiguous()))
    half = strided.bfloat16()
    recon, latents = sae(half)
    assert recon.dtype == torch.float32
    assert torch.equal(latents, sae.encode(half.float()))
    assert torch.equal(sae.reconstruct(half)[0], recon)


def test_empty_batches_and_leading_dimensions():
    sae = TopKSAE(6, 40, 3)
    recon, latents = sae(torch.zeros(0, 6))
    assert recon.shape == (0, 6)
    assert latents.shape == (0, 40)
    x = torch.randn(2, 5, 6)
    recon, latents = sae(x)
    assert torch.equal(recon, sae(x.view(10, 6))[0].view(2, 5, 6))
    assert latents.shape == (2, 5, 40)
    assert (sae.reconstruct(x)[1] == (latents != 0).sum(-1)).all()


def test_same_bits_twice_and_at_two_threads():
    sae, x = TopKSAE(16, 256, 8), torch.randn(64, 16)
    config = SAEConfig(width=256, k=8)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            runs.append(gradients(sae, batch_loss(sae, x, config, 0).total))
    finally:
        torch.set_num_threads(threads)
    for name in PARAMETERS:
        assert torch.equal(runs[0][name], runs[2][name])
        assert torch.allclose(runs[0][name], runs[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "message"), [(torch.zeros(3, 5), "6"), (torch.zeros(3, 6, dtype=torch.int64), "floating")]
)
def test_wrong_activations_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        TopKSAE(6, 40, 3).encode(x)


def test_wrong_latents_are_named():
    with pytest.raises(ValueError, match="40"):
        TopKSAE(6, 40, 3).decode(torch.zeros(2, 41))
