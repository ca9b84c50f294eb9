# SPDX-License-Identifier: Apache-2.0
"""HGRN's recurrence against its definition in float64, and against a filter of scipy's."""

from __future__ import annotations

import itertools

import pytest
import scipy.signal
import torch
from torch import Tensor

from tilewright.ops import chunk_hgrn, fused_recurrent_hgrn
from tilewright.reference.linear_attention import hgrn_recurrence


def _results(function: object, x: Tensor, g: Tensor, state: Tensor, offsets: Tensor | None = None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, g, state)]
    if function is hgrn_recurrence:
        h, final = hgrn_recurrence(leaves[0], leaves[1], initial_state=leaves[2], cu_seqlens=offsets)
    else:
        h, last = chunk_hgrn(*leaves, output_final_state=True, cu_seqlens=offsets)
        assert last is not None
        final = last
    weights = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).reshape(h.shape)
    return [h, final, *torch.autograd.grad((h * weights).sum() + final.square().sum(), leaves, materialize_grads=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("tokens", "width"), [(0, 3), (1, 1), (5, 7), (50, 16), (9, 300)])
def test_values_and_gradients_equal_the_recurrence(tokens: int, width: int, dtype: torch.dtype, level: str) -> None:
    x, g = torch.randn(2, tokens, width, dtype=dtype), -torch.rand(2, tokens, width, dtype=dtype)
    state = torch.randn(2, width, dtype=dtype)
    wanted = _results(hgrn_recurrence, x.double(), g.double(), state.double())
    # An error of 2 ulp of each decay; contributions fade geometrically, so a few of them add up.
    bound = 1e-13 if dtype == torch.float64 else 64 * 2.0**-24
    for got, exact in zip(_results(chunk_hgrn, x, g, state), wanted, strict=True):
        assert torch.allclose(
            got.double(), exact, rtol=bound, atol=bound * (float(exact.detach().abs().amax()) if exact.numel() else 0.0)
        )


def test_equals_a_filter_where_the_gate_is_constant() -> None:
    x = torch.randn(1, 200, 2, dtype=torch.float64)
    decay = torch.tensor([0.9, 0.25], dtype=torch.float64)
    h, _ = chunk_hgrn(x, decay.log().expand_as(x))
    for c in range(2):
        wanted = scipy.signal.lfilter([1.0], [1.0, -float(decay[c])], x[0, :, c].numpy())
        assert torch.allclose(h[0, :, c], torch.from_numpy(wanted), rtol=1e-13, atol=1e-13)


def test_packed_equals_the_loop_bit_for_bit_and_gates_saturate() -> None:
    offsets = [0, 4, 4, 5, 30]
    x, g = torch.randn(1, 33, 20), -torch.rand(1, 33, 20)
    g[0, 7], g[0, 12] = -torch.inf, 0.0
    state = torch.randn(4, 20)
    h, final = chunk_hgrn(x, g, state, True, torch.tensor(offsets))
    assert final is not None
    assert h.isfinite().all()
    assert torch.equal(h[0, 30:], torch.zeros(3, 20))
    for n, (first, last) in enumerate(itertools.pairwise(offsets)):
        alone, end = fused_recurrent_hgrn(x[:, first:last], g[:, first:last], state[n : n + 1], True)
        assert end is not None
        assert torch.equal(alone, h[:, first:last])
        assert torch.equal(end[0], final[n])


def test_operator_contract() -> None:
    x, g, state = torch.randn(2, 5, 6), -torch.rand(2, 5, 6), torch.randn(2, 6)
    leaves = [t.requires_grad_() for t in (x, g, state)]
    torch.library.opcheck(torch.ops.tilewright.hgrn.default, (*leaves, None))
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda x, g, s: chunk_hgrn(x, g, s, True), doubles)
    with pytest.raises(RuntimeError, match=r"g has shape \[2, 4, 6\], but its dimension 1 must be that of x = 5"):
        chunk_hgrn(x, g[:, :4])
    with pytest.raises(RuntimeError, match=r"initial_state has shape \[3, 6\], but its dimension 0 must be N = 2"):
        chunk_hgrn(x, g, torch.zeros(3, 6))
