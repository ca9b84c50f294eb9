# SPDX-License-Identifier: Apache-2.0
"""Gradient pursuit: the Gram form equals the definition, orthogonal matching pursuit bounds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp

from tilewright.inspect.sae import SAEConfig, SAETrainer
from tilewright.inspect.sae_dark_matter import gradient_pursuit, pursue_sae
from tilewright.inspect.sae_dark_matter.pursuit import gradient_pursuit_dense, selectable


def dictionary(m=60, d=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(m, d, generator=generator, dtype=dtype), dim=1)


def by_the_book(x, atoms, steps):
    """One token, in float64 numpy, straight from the definition."""
    w = np.zeros(len(atoms))
    support: set[int] = set()
    for _ in range(steps):
        residual = x - w @ atoms
        g = atoms @ residual
        support.add(int(np.argmax(g)))
        masked = np.where(np.isin(np.arange(len(atoms)), list(support)), g, 0.0)
        c = masked @ atoms
        w = np.maximum(w + (c @ residual) / (c @ c) * masked, 0.0)
    return w


@pytest.mark.parametrize("steps", [0, 1, 5, 12])
@pytest.mark.parametrize("nbytes", [1 << 30, 1])
def test_both_forms_are_the_definition(steps, nbytes):
    atoms, x = dictionary(), torch.randn(300, 12, dtype=torch.float64)
    found = gradient_pursuit(x, atoms, steps, gram_bytes=nbytes)
    dense = gradient_pursuit_dense(x, atoms, steps)
    for i in range(0, 300, 29):
        expected = by_the_book(x[i].numpy(), atoms.numpy(), steps)
        # Each step multiplies errors of rounding by a moderate factor; supports agree, so weights do to many digits.
        assert np.allclose(dense[i].numpy(), expected, atol=1e-9)
    assert torch.allclose(found.dense(60), dense, atol=1e-9)
    assert torch.allclose(found.recon, dense @ atoms, atol=1e-9)
    assert ((found.dense(60) > 0).sum(1) <= steps).all()
    assert found.index.shape == (300, steps)


def test_each_token_has_its_own_number_of_atoms():
    atoms, x = dictionary(), torch.randn(40, 12, dtype=torch.float64)
    steps = torch.arange(40) % 9
    found = gradient_pursuit(x, atoms, steps)
    assert ((found.index >= 0).sum(1) <= steps).all()
    for i in (0, 5, 8, 9, 39):
        alone = gradient_pursuit(x[i : i + 1], atoms, int(steps[i]))
        assert torch.allclose(found.dense(60)[i], alone.dense(60)[0], atol=1e-10)
    assert not found.recon[0].any()
    assert torch.allclose(found.dense(60), gradient_pursuit_dense(x, atoms, steps), atol=1e-9)


def test_weights_are_never_negative_and_error_falls_with_more_atoms():
    atoms, x = dictionary(), torch.randn(200, 12, dtype=torch.float64)
    errors = []
    for steps in (1, 3, 6, 12):
        found = gradient_pursuit(x, atoms, steps)
        assert bool((found.value >= 0).all())
        errors.append(float((x - found.recon).square().sum()))
    assert errors == sorted(errors, reverse=True)


def test_orthogonal_matching_pursuit_bounds_it():
    atoms, x = dictionary(), torch.randn(200, 12, dtype=torch.float64)
    exact = orthogonal_mp(atoms.numpy().T, x.numpy().T, n_nonzero_coefs=4)
    lower = float(
        np.square(x.numpy() - (atoms.numpy().T @ exact).T).sum() / np.square(x.numpy() - x.numpy().mean(0)).sum()
    )
    ours = float((x - gradient_pursuit(x, atoms, 4).recon).square().sum() / (x - x.mean(0)).square().sum())
    assert ours >= lower - 1e-6


@pytest.mark.parametrize("function", [gradient_pursuit, gradient_pursuit_dense])
def test_zero_atoms_are_never_chosen_and_of_equal_ones_the_first_is(function):
    atoms = dictionary(8)
    atoms[2] = 0.0
    atoms[6] = atoms[3]
    atoms[7] = atoms[3]
    assert selectable(atoms).tolist() == [True, True, False, True, True, True, False, False]
    x = atoms[3:4] * 2 + 0.01 * torch.randn(1, 12, dtype=torch.float64)
    found = function(x, atoms, 4)
    weight = found if isinstance(found, torch.Tensor) else found.dense(8)
    assert float(weight[0, 3]) > 1.5
    assert not weight[0, [2, 6, 7]].any()


@pytest.mark.parametrize("x", [torch.zeros(3, 12), torch.zeros(0, 12)])
def test_nothing_to_code(x):
    found = gradient_pursuit(x, dictionary(dtype=torch.float32), 4)
    assert found.recon.shape == x.shape
    assert not found.value.any()
    assert torch.isfinite(found.recon).all()


def test_float32_stays_near_float64():
    atoms, x = dictionary(400, 32), torch.randn(100, 32, dtype=torch.float64)
    exact = gradient_pursuit(x, atoms, 8)
    low = gradient_pursuit(x.float(), atoms.float(), 8)
    fvu = [float((x - f.recon.double()).square().sum() / x.square().sum()) for f in (exact, low)]
    assert fvu[1] == pytest.approx(fvu[0], rel=1e-3)


def test_codes_of_an_sae_have_its_l0_and_less_error():
    torch.manual_seed(0)
    basis = dictionary(48, 16, dtype=torch.float32)
    mixture = (torch.rand(4000, 48) < 0.08).float() * torch.rand(4000, 48)
    x = 3 * mixture @ basis + 1
    sae = SAETrainer(SAEConfig(width=96, k=4, steps=150, batch=256, lr=3e-3)).fit(x)
    recon, l0 = sae.reconstruct(x[:500])
    found = pursue_sae(sae, x[:500])
    assert ((found.value > 0).sum(1) <= l0).all()
    assert float((x[:500] - found.recon).square().sum()) < float((x[:500] - recon).square().sum())
    rebuilt = found.dense(96) @ sae.W_dec.detach() + sae.b_dec.detach()
    assert torch.allclose(rebuilt, found.recon, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "l0", "message"),
    [
        (torch.zeros(3, 11), 2, "x has shape"),
        (torch.full((3, 12), torch.nan), 2, "token 0"),
        (torch.zeros(3, 12), torch.tensor([1, 2]), "l0 has shape"),
        (torch.zeros(3, 12), -1, "l0 has shape"),
    ],
)
def test_bad_input_is_named(x, l0, message):
    with pytest.raises(ValueError, match=message):
        gradient_pursuit(x, dictionary(dtype=torch.float32), l0)
