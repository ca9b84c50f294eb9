# SPDX-License-Identifier: Apache-2.0
"""e4m3 and e5m2 in C++ against torch: all codes, all float16 values, ties, saturation."""

from __future__ import annotations

import math

import pytest
import torch

from tilewright import _host

FORMATS = {
    "e4m3": (torch.float8_e4m3fn, _host.e4m3_encode, _host.e4m3_decode, 448.0),
    "e5m2": (torch.float8_e5m2, _host.e5m2_encode, _host.e5m2_decode, 57344.0),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_decodes_as_in_torch(name: str) -> None:
    dtype, _, decode, _ = FORMATS[name]
    want = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    got = torch.tensor([decode(code) for code in range(256)])
    assert torch.equal(got.nan_to_num(nan=1e9), want.nan_to_num(nan=1e9))
    number = ~want.isnan()
    assert torch.equal(torch.signbit(got[number]), torch.signbit(want[number]))


@pytest.mark.parametrize("name", FORMATS)
def test_every_float16_encodes_as_in_torch_after_saturation(name: str) -> None:
    dtype, encode, _, largest = FORMATS[name]
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    finite = values[torch.isfinite(values)]
    want = finite.clamp(-largest, largest).to(dtype).view(torch.uint8)
    got = torch.tensor([encode(v) for v in finite.tolist()], dtype=torch.uint8)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", FORMATS)
def test_values_between_codes_round_to_nearest_even(name: str) -> None:
    dtype, encode, decode, _ = FORMATS[name]
    codes = [c for c in range(127) if math.isfinite(decode(c)) and math.isfinite(decode(c + 1))]
    middles = [(decode(c) + decode(c + 1)) / 2 for c in codes]
    points = [m * f for m in middles for f in (1.0, 1 - 2**-20, 1 + 2**-20)]
    want = torch.tensor(points).to(dtype).view(torch.uint8).tolist()
    assert [encode(p) for p in points] == want


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinity_saturates_and_nan_stays(name: str, sign: float) -> None:
    _, encode, decode, largest = FORMATS[name]
    assert decode(encode(sign * math.inf)) == sign * largest
    assert decode(encode(sign * 1e30)) == sign * largest
    assert math.isnan(decode(encode(math.nan)))
