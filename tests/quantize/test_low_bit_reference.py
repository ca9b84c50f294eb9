# SPDX-License-Identifier: Apache-2.0
"""The oracles themselves, against torch's casts, integers and each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.reference.low_bit import (
    attention_oracle,
    default_per_tensor_scale,
    dequantize_symmetric,
    fake_fp8,
    fake_int8,
    fake_quantize,
    fold_weight,
    linear_oracle,
    quantize_symmetric,
    round_e4m3,
)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_e4m3_rounding_equals_torch_on_every_float16():
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = x[torch.isfinite(x)]
    expected = x.to(torch.float8_e4m3fn).float()
    assert torch.equal(round_e4m3(x), expected)
    assert torch.equal(round_e4m3(x.double()), expected.double())


def test_e4m3_rounds_float64_once():
    # Just above the tie between 1 and 1.125: float32 would round it onto the tie first, and that to 1.
    x = torch.tensor([1.0625 + 2.0**-40], dtype=torch.float64)
    assert x.float().to(torch.float8_e4m3fn).item() == 1.0
    assert round_e4m3(x).item() == 1.125


def test_e4m3_of_what_is_not_a_number_is_nan():
    assert round_e4m3(torch.tensor([math.nan, math.inf, -math.inf])).isnan().all()


@given(st.integers(1, 70), st.sampled_from([16, 32, 64]), st.sampled_from([2, 3, 4, 8]))
def test_symmetric_codes_are_within_half_a_step(k, group, bits):
    x = noise(3, k, seed=k)
    q, s = quantize_symmetric(x, group, bits)
    assert s.shape == (3, math.ceil(k / group))
    assert torch.equal(q, q.round())
    assert float(q.abs().max()) == 2 ** (bits - 1) - 1
    error = (dequantize_symmetric(q, s, group) - x).abs()
    assert bool((error <= s.repeat_interleave(group, -1)[:, :k] / 2 * (1 + 1e-15)).all())


def test_integers_are_rounded_against_the_rounded_scale():
    x = noise(64, 128, seed=3) * 0.01
    q, s = quantize_symmetric(x, 128, scale_dtype=torch.float8_e4m3fn)
    assert torch.equal(s, s.float().to(torch.float8_e4m3fn).double())
    assert torch.equal(q, (x / s).round().clamp(-7, 7))


def test_zero_groups_stay_zero_and_finite():
    x = torch.zeros(2, 32)
    for value in (fake_quantize(x, 16), fake_fp8(x), fake_int8(x), fake_int8(x, 16)):
        assert torch.equal(value, x)


def test_ties_go_to_even():
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5] + [0.0] * 10])
    q, s = quantize_symmetric(x, 16)
    assert s.item() == 1.0
    assert q[0, :6].tolist() == [7.0, 0.0, 2.0, 2.0, 0.0, -2.0]


def test_fold_is_the_e4m3_of_the_product_and_never_below_exact():
    w = noise(32, 256, seed=4) * 0.02
    p = default_per_tensor_scale(float(quantize_symmetric(w, 128)[1].max()))
    q, s = quantize_symmetric(w * p, 128, scale_dtype=torch.float8_e4m3fn)
    exact, fold = dequantize_symmetric(q, s, 128), fold_weight(q, s, 128)
    assert torch.equal(fold, exact.float().to(torch.float8_e4m3fn).double())
    assert float((fold / p - w).square().mean()) >= float((exact / p - w).square().mean())


@pytest.mark.parametrize("largest", [1e-4, 0.003, 1.0, 55.9, 56.0, 200.0])
def test_default_p_never_saturates_and_is_the_largest_such(largest):
    p = default_per_tensor_scale(largest)
    assert 8 * p * largest <= 448 < 16 * p * largest


@pytest.mark.parametrize("nothing", [0.0, math.inf, math.nan])
def test_default_p_of_no_weight_is_one(nothing):
    assert default_per_tensor_scale(nothing) == 1.0


def test_linear_oracle_is_the_plain_product_without_quantizers():
    x, w, b = noise(5, 48), noise(7, 48, seed=1), noise(7, seed=2)
    assert torch.equal(linear_oracle(x, w, b), x @ w.T + b)
    assert torch.equal(linear_oracle(x, w * 4, b, per_tensor_scale=4.0), x @ w.T + b)
    with pytest.raises(ValueError, match="fp4"):
        linear_oracle(x, w, activations="fp4")


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("new", [1, 3, 9])
def test_attention_oracle_equals_the_explicit_sum(new, window):
    length, heads, kv_heads, d = 9, 4, 2, 8
    q, k, v = noise(new, heads, d), noise(length, kv_heads, d, seed=1), noise(length, kv_heads, d, seed=2)
    got = attention_oracle(q, k, v, window=window, kv_bits=None, query="none")
    for i in range(new):
        position = length - new + i
        first = 0 if window is None else max(0, position - window + 1)
        for h in range(heads):
            keys, values = k[first : position + 1, h // 2], v[first : position + 1, h // 2]
            weight = torch.softmax(keys @ q[i, h] * d**-0.5, 0)
            torch.testing.assert_close(got[i, h], weight @ values, rtol=1e-13, atol=1e-13)


def test_attention_oracle_quantizes_each_token_and_head_alone():
    q, k, v = noise(2, 2, 16), noise(6, 2, 16, seed=1), noise(6, 2, 16, seed=2)
    fake = torch.stack([torch.stack([fake_quantize(k[t, h], 16) for h in range(2)]) for t in range(6)])
    expected = attention_oracle(q, fake, fake_quantize(v, 16), kv_bits=None, query="fp8")
    assert torch.equal(attention_oracle(q, k, v), expected)


def test_query_without_a_visible_key_gives_zeros():
    q = noise(1, 1, 4)
    assert torch.equal(attention_oracle(q, noise(1, 1, 4), noise(1, 1, 4), window=0), torch.zeros(1, 1, 4).double())
