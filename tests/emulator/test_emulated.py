# SPDX-License-Identifier: Apache-2.0
"""The emulator as Python uses it: the CPU's operators are replaced inside the block, and only there."""

from __future__ import annotations

import pytest
import torch

from tilewright.ops import hgrn
from tilewright.testing import emulated, emulated_operators, emulator_missing

pytestmark = pytest.mark.skipif(bool(emulator_missing()), reason=f"there is no emulator: {emulator_missing()}")


# Nine steps of a decayed sum of values below 4, two roundings of 2^-24 each, on both sides.
BOUND = 2 * 9 * 2 * 2**-24 * 4


def call() -> torch.Tensor:
    torch.manual_seed(5)
    x, g = torch.randn(2, 9, 24), torch.randn(2, 9, 24).sigmoid().log()
    return hgrn.chunk_hgrn(x, g)[0]


def test_operators_run_in_the_emulator_inside_the_block_only() -> None:
    plain = call()
    with emulated(seed=3) as emulator:
        before = emulator.launches()
        inside = call()
        assert emulator.launches() > before
        after = emulator.launches()
    assert torch.equal(call(), plain)
    with emulated() as emulator:
        assert emulator.launches() == after
    assert torch.allclose(inside, plain, rtol=0, atol=BOUND)


def test_nothing_is_left_behind() -> None:
    names = emulated_operators()
    assert len(names) > 5
    before = [torch._C._dispatch_dump(name) for name in names]
    with emulated():
        assert [torch._C._dispatch_dump(name) for name in names] != before
    assert [torch._C._dispatch_dump(name) for name in names] == before


def test_the_block_ends_well_after_an_error() -> None:
    plain = call()
    with pytest.raises(ZeroDivisionError), emulated():
        raise ZeroDivisionError
    assert torch.equal(call(), plain)


def test_seeds_change_the_order_and_not_the_result() -> None:
    results = []
    for seed in range(4):
        with emulated(seed=seed):
            results.append(call())
    assert all(torch.equal(result, results[0]) for result in results)


def test_gradients_go_through_the_emulator() -> None:
    x = torch.randn(1, 7, 8, requires_grad=True)
    g = torch.randn(1, 7, 8).sigmoid().log()
    hgrn.chunk_hgrn(x, g)[0].sum().backward()
    expected = x.grad
    x.grad = None
    with emulated() as emulator:
        before = emulator.launches()
        hgrn.chunk_hgrn(x, g)[0].sum().backward()
        assert emulator.launches() >= before + 2
    assert expected is not None
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, rtol=0, atol=BOUND)
