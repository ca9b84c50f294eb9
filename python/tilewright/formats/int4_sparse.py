# SPDX-License-Identifier: Apache-2.0
"""INT4 weights for products that read some rows, or some columns, of a matrix: the blobs of
csrc/format/int4_sparse.h."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from tilewright.formats.int4 import Int4Weight

ROW_COLUMNS, OUTPUTS, LINE = 32, 64, 64
_ROWS, _COLUMNS = 6, 7
_SCALES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_SYMMETRIC, _MINIMUM, _ZERO_POINT = range(3)


def can_pack_rows(weight: Int4Weight) -> bool:
    """Whether :func:`pack_rows` takes this weight: K and the group are multiples of 32."""
    return weight.shape[1] % ROW_COLUMNS == 0 and weight.group_size % ROW_COLUMNS == 0


def pack_rows(weight: Int4Weight) -> Tensor:
    """uint8 blob with each row's codes, scales and offsets together.

    Raises:
        ValueError: K or the group is no multiple of 32.
    """
    if not can_pack_rows(weight):
        raise ValueError(
            f"pack_rows: weight [{weight.shape[0]}, {weight.shape[1]}] in groups of {weight.group_size}; "
            "K and the group must be multiples of 32"
        )
    n, k = weight.shape
    codes = _pairs(weight.unpacked_codes().reshape(n, k // ROW_COLUMNS, 2, ROW_COLUMNS // 2))
    parts = [codes.reshape(n, k // 2), *(_bytes(part) for part in _lanes(weight))]
    return _blob(weight, _ROWS, _lines(torch.cat(parts, 1)))


def pack_columns(weight: Int4Weight) -> Tensor:
    """uint8 blob of the transposed weight: for each group of inputs its scales, its offsets, and a run of codes an
    input."""
    n, k = weight.shape
    group, groups = weight.group_size, -(-k // weight.group_size)
    padded = -(-n // OUTPUTS) * OUTPUTS
    codes = torch.zeros(groups * group, padded, dtype=torch.uint8)
    codes[:k, :n] = weight.unpacked_codes().T
    runs = _lines(_pairs(codes.reshape(groups * group, padded // OUTPUTS, 2, OUTPUTS // 2)).flatten(1))
    parts = []
    for lane in _lanes(weight):
        wide = lane.new_zeros(groups, padded)
        wide[:, :n] = lane.T
        parts.append(_lines(_bytes(wide)))
    return _blob(weight, _COLUMNS, torch.cat([*parts, runs.reshape(groups, -1)], 1))


def _pairs(codes: Tensor) -> Tensor:
    """[..., 2, h] codes to [..., h] bytes, the first half in the low nibbles."""
    low, high = codes.unbind(-2)
    return low | high << 4


def _lanes(weight: Int4Weight) -> list[Tensor]:
    """Scales and offsets as they are packed: e4m3 as float16, which holds each of its values."""
    small = torch.float8_e4m3fn
    lanes = [weight.scales] if weight.offsets is None else [weight.scales, weight.offsets]
    return [lane.to(torch.float16) if lane.dtype == small else lane for lane in lanes]


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _lines(rows: Tensor) -> Tensor:
    """Rows padded with zeros to whole cache lines."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % LINE))


def _blob(weight: Int4Weight, kind: int, payload: Tensor) -> Tensor:
    lanes = _lanes(weight)
    offset = _SYMMETRIC if len(lanes) == 1 else _ZERO_POINT if lanes[1].dtype == torch.uint8 else _MINIMUM
    header = struct.pack(
        "<8sHHBBHqqqqf12x", b"TILEWRT\0", 1, kind, _SCALES[lanes[0].dtype], offset, 0, *weight.shape,
        weight.group_size, payload.numel(), weight.per_tensor_scale,
    )  # fmt: skip
    return torch.cat([torch.frombuffer(bytearray(header), dtype=torch.uint8), payload.reshape(-1)])
