# SPDX-License-Identifier: Apache-2.0
"""The short convolution against its sum written out, its state, and packed sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright.nn.short_convolution import ShortConvolution

# Sums of at most 5 terms in float64; the activation's slope is below 1.1.
BOUND = 1e-14


def written_out(layer: ShortConvolution, x: Tensor) -> Tensor:
    """``act(bias + sum_j w_j o x_{t - W + 1 + j})`` for one sequence [T, C]."""
    width, rows = layer.kernel_size, []
    for t in range(x.shape[0]):
        y = torch.zeros_like(x[0]) if layer.bias is None else layer.bias.clone()
        for j in range(width):
            if t - width + 1 + j >= 0:
                y = y + layer.weight[:, 0, j] * x[t - width + 1 + j]
        rows.append(F.silu(y) if layer.activation else y)
    return torch.stack(rows)


def make(**options) -> ShortConvolution:
    layer = ShortConvolution(6, **options).double()
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("options", [{}, {"kernel_size": 1}, {"kernel_size": 7}, {"bias": True, "activation": None}])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 11])
def test_equals_the_sum_written_out(options, tokens):
    layer, x = make(**options), torch.randn(2, tokens, 6, dtype=torch.float64)
    y, state = layer(x)
    for row in range(2):
        torch.testing.assert_close(y[row], written_out(layer, x[row]), rtol=0, atol=BOUND)
    kept = min(tokens, layer.kernel_size - 1)
    assert torch.equal(state[..., state.shape[-1] - kept :], x.transpose(1, 2)[..., tokens - kept :])
    assert not state[..., : state.shape[-1] - kept].any()


@pytest.mark.parametrize("cuts", [[5], [1, 2, 3], [0, 0, 4], [12]])
def test_pieces_with_a_state_equal_the_whole(cuts):
    layer, x = make(), torch.randn(2, 13, 6, dtype=torch.float64)
    whole, last = layer(x)
    state, pieces = None, []
    for piece in torch.tensor_split(x, cuts, dim=1):
        y, state = layer(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=BOUND)
    assert torch.equal(state, last)


@pytest.mark.parametrize("lengths", [[5, 8], [1, 1, 2], [0, 3, 0, 0, 4], [13], [0]])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_do_not_see_each_other(lengths, with_state):
    layer, total = make(), sum(lengths)
    x = torch.randn(1, total, 6, dtype=torch.float64)
    states = torch.randn(len(lengths), 6, 3, dtype=torch.float64) if with_state else None
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    y, new = layer(x, states, bounds)
    for n, piece in enumerate(x[0].split(lengths)):
        alone, state = layer(piece[None], None if states is None else states[n : n + 1])
        torch.testing.assert_close(y[0, bounds[n] : bounds[n + 1]], alone[0], rtol=0, atol=BOUND)
        assert torch.equal(new[n], state[0])


def test_not_a_number_stays_in_its_sequence():
    layer, x = make(), torch.randn(1, 9, 6, dtype=torch.float64)
    clean, _ = layer(x, cu_seqlens=torch.tensor([0, 4, 9]))
    x[0, :4] = float("nan")
    y, state = layer(x, cu_seqlens=torch.tensor([0, 4, 9]))
    assert torch.equal(y[0, 4:], clean[0, 4:])
    assert y[0, :4].isnan().all()
    assert not state[1].isnan().any()


def test_gradients_of_packed_sequences():
    layer = make(bias=True)
    x = torch.randn(1, 7, 6, dtype=torch.float64, requires_grad=True)
    state = torch.randn(3, 6, 3, dtype=torch.float64, requires_grad=True)
    bounds = torch.tensor([0, 2, 2, 7])
    assert torch.autograd.gradcheck(lambda a, s: layer(a, s, bounds), (x, state))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ShortConvolution(0), "channels = 0"),
        (lambda: ShortConvolution(4, activation="relu"), "'relu'"),
        (lambda: make()(torch.zeros(1, 3, 5)), r"needed \[B, T, 6\]"),
        (lambda: make()(torch.zeros(2, 3, 6), None, torch.tensor([0, 3])), "B = 1"),
        (lambda: make()(torch.zeros(2, 3, 6), torch.zeros(2, 6, 4)), r"needed \[2, 6, 3\]"),
    ],
)
def test_errors_say_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
