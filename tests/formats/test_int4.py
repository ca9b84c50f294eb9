# SPDX-License-Identifier: Apache-2.0
"""INT4 weights: the grid, storage, and the blob that the kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.formats import Int4Weight, pack_codes, per_channel_group, quantize_int4
from tilewright.formats.int4 import SCALE_DTYPES


def brute_force_symmetric(weight: torch.Tensor, group: int, scale_dtype: torch.dtype) -> torch.Tensor:
    """The definition, one group at a time, in Python numbers."""
    out = torch.empty_like(weight)
    for n in range(weight.shape[0]):
        for first in range(0, weight.shape[1], group):
            part = weight[n, first : first + group]
            scale = (torch.maximum(part.abs().max(), torch.tensor(1e-5)) / 7).to(scale_dtype).float()
            if scale_dtype == torch.float8_e4m3fn:
                scale = scale.clamp(min=2.0**-9)
            out[n, first : first + group] = (part / scale).round().clamp(-7, 7) * scale
    return out


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize(("columns", "group"), [(64, 16), (576, 128), (100, 32), (7, 16), (1, 16), (33, 48)])
def test_symmetric_grid_is_the_definition(scale_dtype: torch.dtype, columns: int, group: int) -> None:
    weight = torch.randn(5, columns)
    got = quantize_int4(weight, group, scale_dtype).dequantize()
    assert torch.equal(got, brute_force_symmetric(weight, min(group, per_channel_group(columns)), scale_dtype))


@pytest.mark.parametrize("columns", [32, 50])
def test_asymmetric_error_is_at_most_half_a_step(columns: int) -> None:
    weight = torch.randn(6, columns) + 3.0
    q = quantize_int4(weight, 32, torch.float32, symmetric=False)
    step = q.scales.repeat_interleave(32, -1)[:, :columns]
    assert ((q.dequantize() - weight).abs() <= step * (0.5 + 1e-5)).all()


@given(rows=st.integers(1, 40), columns=st.integers(1, 90), data=st.data())
@settings(max_examples=60, deadline=None)
def test_codes_survive_storage_for_any_shape(rows: int, columns: int, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**31))
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    weight = Int4Weight(pack_codes(codes), torch.ones(rows, 1), None, (rows, columns), per_channel_group(columns))
    assert torch.equal(weight.unpacked_codes(), codes)


@pytest.mark.parametrize("offset", ["none", "minimum", "zero"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_packed_blob_holds_exactly_the_weight(offset: str, scale_dtype: torch.dtype) -> None:
    """The kernel on unit vectors with INT8 codes of 127 and a scale of 1/127 reads the matrix back."""
    rows, columns, group = 37, 53, 16
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scales = torch.rand(rows, 4).to(scale_dtype)
    offsets = {
        "none": None,
        "minimum": torch.randn(rows, 4).to(scale_dtype),
        "zero": torch.randint(0, 16, (rows, 4), dtype=torch.uint8),
    }[offset]
    weight = Int4Weight(pack_codes(codes), scales, offsets, (rows, columns), group)
    reference = torch.ops.tilewright.int4_linear_reference(
        torch.eye(columns), weight.pack().data, None, rows, 0, False, False
    )
    # 127 * (1/127 in float32) is 1 within one rounding of the scale.
    exact = weight.dequantize(torch.float64).T
    assert ((reference - exact).abs() <= exact.abs() * 2.0**-23).all()


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_tensors_and_metadata_restore_the_weight(scale_dtype: torch.dtype, symmetric: bool) -> None:
    weight = quantize_int4(torch.randn(8, 48), 16, scale_dtype, 2.0, symmetric=symmetric)
    again = Int4Weight.from_tensors("w", weight.to_tensors("w"), weight.metadata())
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.metadata() == weight.metadata()


@pytest.mark.parametrize("std_exponent", [0, -4, -8])
def test_automatic_per_tensor_scale_keeps_e4m3_scales_normal(std_exponent: int) -> None:
    weight = torch.randn(64, 256) * 0.02 * 2.0**std_exponent
    q = quantize_int4(weight, 128, torch.float8_e4m3fn, "auto")
    scales = q.scales.float()
    assert 8 * scales.max() <= 448
    assert scales.max() > 14, "half the range would go unused"
    assert (scales >= 2.0**-6).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"weight": torch.randn(4)}, "matrix"),
        ({"weight": torch.zeros(4, 4, dtype=torch.int32)}, "floating"),
        ({"weight": torch.full((2, 16), torch.nan)}, "NaN"),
        ({"weight": torch.full((2, 16), torch.inf)}, "infinity"),
        ({"weight": torch.randn(2, 16), "group_size": 24}, "24"),
        ({"weight": torch.randn(2, 16), "group_size": 0}, "0"),
        ({"weight": torch.randn(2, 16), "scale_dtype": torch.float64}, "float64"),
        ({"weight": torch.randn(2, 0)}, "columns"),
        ({"weight": torch.full((2, 16), 1e9), "scale_dtype": torch.float16}, "overflows"),
    ],
)
def test_bad_input_is_named(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quantize_int4(**arguments)
