# SPDX-License-Identifier: Apache-2.0
"""Windowed softmax against the whole [T, T] matrix, and its memory against one long call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.linearize.cache import StateLayer
from tilewright.linearize.window import padding_first, put_back, remember, take, window_attention


def dense(q, k, v, window, real=None):
    """Softmax over an explicit mask in float64; log of the denominators."""
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    i = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    j = torch.arange(k.shape[1])[None]
    open_ = ((j <= i) & (i - j < window))[None]
    if real is not None:
        open_ = open_ & real[:, None]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~open_[:, None], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40), past=st.integers(0, 20), window=st.integers(1, 24), groups=st.integers(1, 3),
    batch=st.integers(1, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_dense_matrix(tokens, past, window, groups, batch, seed):
    torch.manual_seed(seed)
    q = torch.randn(batch, tokens, 2 * groups, 8, dtype=torch.float64)
    k, v = (torch.randn(batch, past + tokens, 2, d, dtype=torch.float64) for d in (8, 5))
    out, total = window_attention(q, k, v, window=window)
    want, log_sum = dense(q, k, v, window)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(total, log_sum, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_dense_matrix():
    inputs = [torch.randn(1, 21, h, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    probe = torch.randn(1, 21, 4, 4, dtype=torch.float64)
    got = torch.autograd.grad((window_attention(*inputs, window=5)[0] * probe).sum(), inputs)
    want = torch.autograd.grad((dense(*inputs, 5)[0] * probe).sum(), inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_window_of_one_returns_the_value():
    q, k, v = torch.randn(3, 2, 9, 2, 4)
    assert torch.equal(window_attention(q, k, v, window=1)[0], v)


def test_padding_is_not_seen():
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, :11] = False
    q, k, v = torch.randn(3, 2, 30, 2, 8, dtype=torch.float64)
    k[0, :11], v[0, :11] = 1e6, 1e6
    out, _ = window_attention(q, k, v, window=6, real=real)
    torch.testing.assert_close(out[real], dense(q, k, v, 6, real)[0][real], rtol=0, atol=1e-12)
    assert out.isfinite().all()


@pytest.mark.parametrize("sizes", [[30], [1] * 30, [5, 1, 1, 13, 10], [29, 1]])
@pytest.mark.parametrize("window", [1, 7, 64])
def test_pieces_with_a_memory_equal_one_call(sizes, window):
    q, k, v = torch.randn(3, 2, 30, 2, 8, dtype=torch.float64)
    state, out = StateLayer(), []
    for part in zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True):
        keys, values, real = remember(state, part[1], part[2], None, window)
        out.append(window_attention(part[0], keys, values, window=window, real=real)[0])
    torch.testing.assert_close(torch.cat(out, 1), window_attention(q, k, v, window=window)[0], rtol=0, atol=1e-12)
    assert state.get("window_keys").shape[1] == min(window - 1, 30)


def test_padding_that_arrives_later_does_not_shorten_the_window():
    """Row 0 has 3 real tokens, then 2 pads and 4 real ones; it must equal its 7 real tokens alone."""
    q, k, v = torch.randn(3, 1, 9, 2, 8, dtype=torch.float64)
    state = StateLayer()
    remember(state, k[:, :3], v[:, :3], None, 5)
    real = torch.tensor([[False, False, True, True, True, True]])
    keys, values, seen = remember(state, k[:, 3:], v[:, 3:], real, 5)
    out, _ = window_attention(q[:, 3:], keys, values, window=5, real=seen)
    kept = [0, 1, 2, 5, 6, 7, 8]
    want, _ = window_attention(q[:, kept], k[:, kept], v[:, kept], window=5)
    torch.testing.assert_close(out[:, 2:], want[:, 3:], rtol=0, atol=1e-12)


def test_order_of_padding():
    real = torch.tensor([[True, False, True], [True, True, True]])
    order = padding_first(real)
    assert order.tolist() == [[1, 0, 2], [0, 1, 2]]
    x = torch.randn(2, 3, 4)
    assert torch.equal(put_back(take(x, order), order), x)
    assert padding_first(torch.tensor([[False, True, True]])) is None


@pytest.mark.parametrize(
    ("shapes", "window", "what"),
    [
        (((1, 2, 3, 4), (1, 2, 2, 4)), 3, "multiple"),
        (((1, 5, 2, 4), (1, 2, 2, 4)), 3, "L >= T"),
        (((1, 2, 2, 4), (1, 2, 2, 4)), 0, "window = 0"),
    ],
)
def test_bad_arguments_are_named(shapes, window, what):
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=what):
        window_attention(q, k, k, window=window)
