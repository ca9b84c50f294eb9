# SPDX-License-Identifier: Apache-2.0
"""Attention and whole layers: against float64, and the same bits however tokens arrive."""

from __future__ import annotations

import numpy as np
import pytest
from edge_inputs import POINTS, halves, small_layer

from tilewright.edge import contract as c
from tilewright.edge import reference
from tilewright.edge.reference import softmax_attention


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 2), (4, 2, 32), (9, 3, 64), (2, 2, 96), (1, 1, 256)])
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_error_against_float64(rng: np.random.Generator, heads: int, kv_heads: int, size: int, tokens: int) -> None:
    q, k, v = (rng.standard_normal((tokens, h, size)).astype(np.float16) for h in (heads, kv_heads, kv_heads))
    status = c.StatusRegister()
    got = c.attention(q, k, v, status=status)
    true = softmax_attention(q, k, v)
    # Half a place of the output; weights, division and values as the contract's table has them.
    bound = np.abs(true) * (2.0**-11 + 2.0**-15) + np.abs(v).max() * (2 * 1.2e-4 + 2.0**-13)
    assert (np.abs(got - true) <= bound).all()
    assert np.abs(got - true).max() <= 2e-3
    assert status.value == c.Status(0)


def test_prompt_and_steps_are_the_same_bits(rng: np.random.Generator) -> None:
    q, k, v = halves(rng, 23, 6, 16, spread=0.7), halves(rng, 23, 2, 16, spread=0.7), halves(rng, 23, 2, 16, spread=1.0)
    whole = c.attention(q, k, v)
    steps = [c.attention(q[i : i + 1], k[: i + 1], v[: i + 1], first=i) for i in range(23)]
    assert np.array_equal(whole, np.concatenate(steps))
    two = [c.attention(q[:9], k[:9], v[:9]), c.attention(q[9:], k, v, first=9)]
    assert np.array_equal(whole, np.concatenate(two))


def test_one_token_is_its_value(rng: np.random.Generator) -> None:
    v = rng.standard_normal((1, 2, 32)).astype(np.float16)
    q = rng.standard_normal((1, 4, 32)).astype(np.float16)
    got = c.attention(q, q[:, :2], v)
    true = v.repeat(2, 1).astype(np.float64)
    assert (np.abs(got - true) <= np.abs(true) * 2.0**-10 + np.abs(true).max(-1, keepdims=True) * 2.0**-13).all()


def test_equal_scores_average_over_the_longest_context() -> None:
    """4096 keys of full weight: the sums stay inside 48 bits, the mean is right."""
    k = np.zeros((4096, 1, 2), np.float16)
    v = np.full((4096, 1, 2), 2047.0, np.float16)
    v[::2, 0, 1] = -2047
    got = c.attention(np.ones((1, 1, 2), np.float16), k, v, first=4095)
    assert got[0, 0].tolist() == [2047, 0]


def test_a_far_larger_key_wins_and_an_old_one_is_forgotten() -> None:
    k = np.zeros((3, 1, 2), np.float16)
    v = np.array([[[1, 1]], [[7, 7]], [[9, 9]]], np.float16)
    k[1] = 30
    q = np.full((1, 1, 2), 30, np.float16)
    assert (c.attention(q, k, v, first=2) == 7).all()
    k[1] = -30
    assert (c.attention(q, k, v, first=2) == 5).all()


def test_wild_inputs_give_finite_results_and_status() -> None:
    for value, bit in ((np.nan, c.Status.NONFINITE), (np.inf, c.Status.NONFINITE | c.Status.SCORE_CLAMP)):
        q = np.full((2, 1, 4), value, np.float16)
        status = c.StatusRegister()
        got = c.attention(q, q, np.ones((2, 1, 4), np.float16), status=status)
        assert np.isfinite(got).all()
        assert status.value == bit


def test_shapes_that_do_not_fit_are_named() -> None:
    x = np.zeros((2, 3, 4), np.float16)
    with pytest.raises(ValueError, match="multiple of the key"):
        c.attention(x, x[:, :2], x[:, :2])
    with pytest.raises(ValueError, match="needed"):
        c.attention(x, x[:1], x[:1])


@pytest.mark.parametrize("gate_map", ["silu", "squared_relu"])
@pytest.mark.parametrize("norms", [2, 4])
def test_a_layer_gives_the_same_bits_as_prompt_and_in_steps(
    rng: np.random.Generator, gate_map: str, norms: int
) -> None:
    layer = small_layer(rng, POINTS[1], gate_map=gate_map, norms=norms)
    x = halves(rng, 7, 24, spread=0.3)
    angles = c.rope_table(16, layer.head_size)
    whole_cache, step_cache = (c.KvCache.empty(16, layer.kv_heads, layer.head_size) for _ in range(2))
    whole = c.decoder_layer(x, layer, whole_cache, angles)
    steps = [c.decoder_layer(x[i : i + 1], layer, step_cache, angles) for i in range(7)]
    assert np.array_equal(whole, np.concatenate(steps))
    assert np.array_equal(whole_cache.k, step_cache.k)
    with pytest.raises(ValueError, match="capacity 16"):
        c.decoder_layer(np.zeros((10, 24), np.float16), layer, step_cache, angles)


def test_a_layer_is_near_the_same_layer_in_float64(rng: np.random.Generator) -> None:
    """Quantization steps apart: what is compared is that no unit is missing, exchanged or scaled wrongly."""
    layer = small_layer(rng, POINTS[1])
    x = halves(rng, 9, 24, spread=0.3)
    got = c.decoder_layer(x, layer, c.KvCache.empty(9, 2, 8), c.rope_table(9, 8)).astype(np.float64)

    wide = reference.decoder_layer(x, layer)
    assert np.abs(got - wide).max() < 0.05 * np.abs(wide - x).max()
