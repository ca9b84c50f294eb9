# SPDX-License-Identifier: Apache-2.0
"""sorted_w2 against an integral over merged quantile breakpoints in float64, at every level, and its gradient."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright.ops.sorted_w2 import KERNEL_SAMPLES, sorted_w2
from tilewright.reference.sorted_w2 import sorted_w2 as by_sorting

# Sums of up to 256 squares in float32, each difference rounded once: below (256 / 2 + 3) 2^-24 of the sum of terms; a
# difference of close values is exact (Sterbenz).
FLOAT32 = 2.0**-17


def integral(x: np.ndarray, y: np.ndarray) -> float:
    n, m = len(x), len(y)
    x, y = np.sort(x), np.sort(y)
    ends = np.unique(np.concatenate([np.arange(n + 1) * m, np.arange(m + 1) * n]))
    total = 0.0
    for low, high in itertools.pairwise(ends):
        total += (x[low // m] - y[low // n]) ** 2 * (high - low) / (n * m)
    return total


def oracle(z: Tensor, v: Tensor) -> Tensor:
    z, v = z.double().numpy(), v.double().numpy()
    return torch.tensor([integral(z[:, j], v[:, j]) for j in range(z.shape[1])], dtype=torch.float64)


def samples(n: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (17, 17), (64, 64), (1, 5), (5, 1), (7, 5), (32, 20), (128, 3)])
@pytest.mark.parametrize("columns", [1, 15, 16, 33])
def test_values_are_the_integral(sizes, columns, level, poisoned):
    z, v = samples(sizes[0], columns), samples(sizes[1], columns, 1) * 2 - 1
    assert torch.allclose(sorted_w2(z, v), oracle(z, v), rtol=1e-12, atol=0)
    z, v = z.float(), v.float()
    assert torch.allclose(sorted_w2(z, v).double(), oracle(z, v), rtol=FLOAT32, atol=0)


def test_levels_give_the_same_bits():
    from tilewright.testing import isa_level, isa_levels

    z, v = samples(31, 50, dtype=torch.float32), samples(20, 50, 1, torch.float32)
    found = []
    for name in isa_levels():
        with isa_level(name):
            found.append(torch.ops.tilewright.sorted_w2(z, v))
    for cost, gradient in found:
        assert torch.equal(cost, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_threads_give_the_same_bits():
    z, v = samples(32, 3000, dtype=torch.float32), samples(32, 3000, 1, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(sorted_w2(z, v))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 20), m=st.integers(1, 20), columns=st.integers(0, 40), seed=st.integers(0, 99))
def test_any_shape_and_ties(n, m, columns, seed):
    """Whole numbers: many ties, exact sums."""
    z, v = (samples(k, columns, seed + k).mul(2).round() for k in (n, m))
    assert torch.allclose(sorted_w2(z, v), oracle(z, v), rtol=1e-12, atol=1e-12)
    assert torch.allclose(sorted_w2(z, v), sorted_w2(v, z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(9, 9), (9, 6), (4, 10)])
def test_gradients_by_finite_differences(sizes):
    random = np.random.default_rng(0)
    # A grid in random order: no two of a column within reach of a finite difference.
    z, v = (
        torch.from_numpy(np.stack([random.permutation(n) for _ in range(5)], 1) * 0.37 + offset).requires_grad_()
        for n, offset in zip(sizes, (0.0, 0.11), strict=True)
    )
    assert torch.autograd.gradcheck(sorted_w2, (z, v))


def test_gradients_are_those_of_torch_sort():
    z, v = samples(24, 40), samples(18, 40, 1)
    weights = torch.arange(40.0, dtype=torch.float64)
    found = []
    for function in (sorted_w2, by_sorting):
        a, b = z.clone().requires_grad_(), v.clone().requires_grad_()
        (function(a, b) * weights).sum().backward()
        found.append((a.grad, b.grad))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14)


def test_more_samples_than_the_kernel_counts_are_sorted_by_torch():
    z, v = samples(KERNEL_SAMPLES + 1, 3), samples(KERNEL_SAMPLES + 40, 3, 1)
    assert torch.allclose(sorted_w2(z, v), oracle(z, v), rtol=1e-12, atol=0)


def test_strided_and_low_precision_inputs():
    z, v = samples(12, 20).T.contiguous().T, samples(24, 40, 1)[::2, ::2]
    assert torch.allclose(sorted_w2(z, v), oracle(z, v), rtol=1e-12, atol=0)
    low = z.bfloat16().requires_grad_()
    cost = sorted_w2(low, v.float())
    assert cost.dtype == torch.float32
    cost.sum().backward()
    assert low.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_nan_stays_in_its_column(side, place):
    pair = [samples(7, 18, dtype=torch.float32), samples(7, 18, 1, torch.float32)]
    pair[side][place, 5] = torch.nan
    cost = sorted_w2(*pair)
    assert torch.isnan(cost).tolist() == [j == 5 for j in range(18)]


def test_wrong_arguments_say_what_is_needed():
    good = samples(3, 4)
    with pytest.raises(ValueError, match=r"z has shape \[0, 4\], needed \[at least 1 sample, D\]"):
        sorted_w2(torch.zeros(0, 4), good)
    with pytest.raises(ValueError, match="z has 4 columns, v has 5"):
        sorted_w2(good, samples(3, 5))
    with pytest.raises(ValueError, match=r"v has shape \[4\]"):
        sorted_w2(good, good[0])
    with pytest.raises(RuntimeError, match="needed 1 to 256 samples"):
        torch.ops.tilewright.sorted_w2(torch.zeros(257, 2), torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="z has dtype"):
        torch.ops.tilewright.sorted_w2(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    z, v = samples(5, 20, dtype=dtype).requires_grad_(), samples(4, 20, 1, dtype).requires_grad_()
    torch.library.opcheck(torch.ops.tilewright.sorted_w2, (z, v))
