# SPDX-License-Identifier: Apache-2.0
"""INT4 weights: canonical tensors, quantization, storage, and the blob that the kernels read."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

SYMMETRIC_ZERO = 8
LARGEST = 7
"""Largest magnitude of a symmetric code: 15 levels, so that a code is also an exact sign-magnitude number."""
MIN_ABSMAX = 1e-5
GROUP_MULTIPLE = 16
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
E4M3_SMALLEST = 2.0**-9
E4M3_LARGEST = 448.0


@dataclass(frozen=True)
class PackedInt4:
    """A weight as the kernels of one kind of device read it: a header (magic, format, version, shape, group) and data.

    Attributes:
        data: uint8, one-dimensional.
        shape: (N, K).
        layout: 0 is the CPU's; another number is that of the CUDA kernels and says of the weight what they must know
            before they can read it.
    """

    data: Tensor
    shape: tuple[int, int]
    layout: int = 0

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def repacked(self, kind: Literal["cpu", "cuda"]) -> PackedInt4:
        """In the layout of that kind of device, where it is now. Nothing is lost either way."""
        return self._as(kind == "cuda", self.data.device)

    def to(self, device: torch.device | str) -> PackedInt4:
        """On that device, in the layout of its kernels."""
        device = torch.device(device)
        return self._as(device.type == "cuda", device)

    def _as(self, cuda: bool, device: torch.device) -> PackedInt4:
        if (self.layout != 0) == cuda:
            return PackedInt4(self.data.to(device), self.shape, self.layout)
        blob = torch.ops.tilewright.int4_repack(self.data.cpu(), cuda)  # repacking is done on the CPU
        layout = torch.ops.tilewright.int4_blob_layout(blob)
        return PackedInt4(blob.to(device), self.shape, layout)


@dataclass(frozen=True)
class Int4Weight:
    """A matrix [N, K] of 4-bit codes u with a scale (and perhaps an offset) for each group of columns.

    Attributes:
        codes: uint8 `[N, ceil(K/2)]`, low nibble the even column.
        scales: `[N, G]` float16, bfloat16, float32 or float8_e4m3fn, G = ceil(K / group_size).
        offsets: None: value = (u - 8) * scale. Floating, of the dtype of scales: value = u * scale + offset. uint8:
            value = (u - offset) * scale.
        shape: (N, K).
        group_size: a multiple of 16; the last group may be short. K rounded up to 16 means one scale a row.
        per_tensor_scale: p of FireQ; the values above are p times the weight.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    shape: tuple[int, int]
    group_size: int
    per_tensor_scale: float = 1.0

    def __post_init__(self) -> None:
        n, k = self.shape
        check_group(self.group_size)
        groups = math.ceil(k / self.group_size)
        _expect("codes", self.codes, (n, (k + 1) // 2), (torch.uint8,))
        _expect("scales", self.scales, (n, groups), SCALE_DTYPES)
        if self.offsets is not None:
            _expect("offsets", self.offsets, (n, groups), (torch.uint8, self.scales.dtype))
        if not (math.isfinite(self.per_tensor_scale) and self.per_tensor_scale > 0):
            raise ValueError(f"Int4Weight: per_tensor_scale = {self.per_tensor_scale}, needed a positive finite number")

    @property
    def symmetric(self) -> bool:
        return self.offsets is None

    @property
    def nbytes(self) -> int:
        tensors = [self.codes, self.scales] + ([] if self.offsets is None else [self.offsets])
        return sum(t.numel() * t.element_size() for t in tensors)

    def unpacked_codes(self) -> Tensor:
        """The codes u as uint8 `[N, K]`."""
        pairs = torch.stack((self.codes & 15, self.codes >> 4), dim=-1)
        return pairs.flatten(-2)[:, : self.shape[1]]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]`. The arithmetic runs in float64 when that is asked for, in float32 otherwise."""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        scale = _per_column(self.scales.to(work), self.shape[1], self.group_size)
        code = self.unpacked_codes().to(work)
        if self.offsets is None:
            value = (code - SYMMETRIC_ZERO) * scale
        elif self.offsets.dtype == torch.uint8:
            value = (code - _per_column(self.offsets.to(work), self.shape[1], self.group_size)) * scale
        else:
            value = code * scale + _per_column(self.offsets.to(work), self.shape[1], self.group_size)
        return (value / self.per_tensor_scale).to(dtype)

    def pack(self) -> PackedInt4:
        """Interleave for the kernels of the device that the codes are on: the CPU, or a CUDA device.

        An e4m3 scale becomes float16, which holds each of its values.
        """
        from tilewright import _native

        _native.require()
        small = self.scales.dtype == torch.float8_e4m3fn
        scales = self.scales.to(torch.float16) if small else self.scales
        offsets = self.offsets
        if offsets is not None and offsets.dtype == torch.float8_e4m3fn:
            offsets = offsets.to(torch.float16)
        blob = torch.ops.tilewright.int4_pack(
            self.codes.cpu(),
            scales.cpu(),
            None if offsets is None else offsets.cpu(),
            self.shape[1],
            self.group_size,
            self.per_tensor_scale,
        )
        return PackedInt4(blob, self.shape).to(self.codes.device)

    def to(self, device: torch.device | str) -> Int4Weight:
        """The same weight with its tensors on that device."""
        offsets = None if self.offsets is None else self.offsets.to(device)
        return dataclasses.replace(self, codes=self.codes.to(device), scales=self.scales.to(device), offsets=offsets)

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Tensors for a safetensors file: `prefix.codes`, `prefix.scales` and, if there are any, `prefix.offsets`."""
        tensors = {f"{prefix}.codes": self.codes, f"{prefix}.scales": self.scales}
        if self.offsets is not None:
            tensors[f"{prefix}.offsets"] = self.offsets
        return {name: t.contiguous() for name, t in tensors.items()}

    def metadata(self) -> dict[str, Any]:
        """What `from_tensors` needs beside the tensors; plain JSON."""
        return {
            "format": "int4",
            "version": 1,
            "shape": list(self.shape),
            "group_size": self.group_size,
            "per_tensor_scale": self.per_tensor_scale,
            "offsets": None if self.offsets is None else str(self.offsets.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_tensors(cls, prefix: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Int4Weight:
        """The inverse of `to_tensors` and `metadata`.

        Raises:
            ValueError: a tensor is missing, or the metadata is of another format or version.
        """
        wanted = {"format", "version", "shape", "group_size", "per_tensor_scale", "offsets"}
        if set(metadata) != wanted or metadata["format"] != "int4" or metadata["version"] != 1:
            raise ValueError(f"{prefix}: metadata {metadata} is not that of an int4 weight of version 1")
        names = [f"{prefix}.codes", f"{prefix}.scales"]
        if metadata["offsets"] is not None:
            names.append(f"{prefix}.offsets")
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"{prefix}: tensors {missing} are missing")
        n, k = metadata["shape"]
        return cls(
            codes=tensors[names[0]],
            scales=tensors[names[1]],
            offsets=tensors[names[2]] if len(names) == 3 else None,
            shape=(int(n), int(k)),
            group_size=int(metadata["group_size"]),
            per_tensor_scale=float(metadata["per_tensor_scale"]),
        )


def _expect(name: str, tensor: Tensor, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"Int4Weight: {name} has shape {tuple(tensor.shape)}, needed {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"Int4Weight: {name} has dtype {tensor.dtype}, needed one of {dtypes}")


def check_group(group_size: int) -> None:
    """Raise ValueError unless group_size is a positive multiple of 16."""
    if group_size <= 0 or group_size % GROUP_MULTIPLE:
        raise ValueError(f"group_size = {group_size}, needed a positive multiple of {GROUP_MULTIPLE}")


def per_channel_group(columns: int) -> int:
    """The group size that gives one scale a row: K rounded up to a multiple of 16."""
    return max(GROUP_MULTIPLE, math.ceil(columns / GROUP_MULTIPLE) * GROUP_MULTIPLE)


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 `[N, K]` to two a byte, `[N, ceil(K/2)]`."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _per_column(groups: Tensor, columns: int, group_size: int) -> Tensor:
    return groups.repeat_interleave(group_size, dim=-1)[..., :columns]


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """`[N, G, group]`, the short last group filled with its own last column (which changes no extreme)."""
    n, k = weight.shape
    short = -k % group_size
    if short:
        weight = torch.cat((weight, weight[:, -1:].expand(n, short)), dim=1)
    return weight.view(n, -1, group_size)


def auto_per_tensor_scale(largest_scale: float) -> float:
    """The power of two p that brings the largest e4m3 group scale just below 56, so that 8 * scale never saturates and
    as many scales as possible are normal numbers (FireQ against FP8 underflow)."""
    return 2.0 ** math.floor(math.log2(E4M3_LARGEST / 8 / largest_scale))


def _round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        return scale.clamp(max=E4M3_LARGEST).to(dtype).float().clamp(min=E4M3_SMALLEST).to(dtype)
    rounded = scale.to(dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(f"quantize_int4: a group scale up to {float(scale.max()):.3g} overflows {dtype}; use float32")
    tiny = torch.finfo(dtype).tiny
    return rounded.float().clamp(min=tiny).to(dtype)


def quantize_int4(
    weight: Tensor,
    group_size: int = 128,
    scale_dtype: torch.dtype = torch.bfloat16,
    per_tensor_scale: float | Literal["auto"] | None = None,
    *,
    symmetric: bool = True,
) -> Int4Weight:
    """Round a weight `[N, K]` to the nearest point of an INT4 grid (FireQ, arXiv 2505.20839, weight format).

    Symmetric: scale = max(absmax, 1e-5) / 7 of each group, rounded to scale_dtype first; codes are rounded half to even
    against the rounded scale and lie in -7..7. Asymmetric: scale = (max - min) / 15 with the minimum stored.

    Args:
        group_size: columns that share a scale; a multiple of 16; 128 in the paper.
        scale_dtype: float16, bfloat16, float32 or float8_e4m3fn.
        per_tensor_scale: p, applied before rounding and divided out of the result; "auto" picks the power of two that
            keeps e4m3 scales normal; None is 1.

    Raises:
        ValueError: weight is not a finite matrix, or group_size or scale_dtype is none of the allowed.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_int4: weight has shape {tuple(weight.shape)} and dtype {weight.dtype}, "
            "needed a floating matrix [N, K]"
        )
    if weight.shape[1] == 0:
        raise ValueError("quantize_int4: weight has no columns")
    check_group(group_size)
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"quantize_int4: scale_dtype = {scale_dtype}, needed one of {SCALE_DTYPES}")
    values = weight.detach().float()
    if not torch.isfinite(values).all():
        raise ValueError("quantize_int4: weight holds NaN or infinity; repair the checkpoint before quantizing")
    group_size = min(group_size, per_channel_group(weight.shape[1]))
    groups = _grouped(values, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    absmax = torch.maximum(low.abs(), high.abs())
    spread = absmax.clamp(min=MIN_ABSMAX) / LARGEST if symmetric else (high - low).clamp(min=MIN_ABSMAX) / 15
    p = 1.0
    if per_tensor_scale == "auto":
        p = auto_per_tensor_scale(float(spread.max())) if spread.numel() else 1.0
    elif per_tensor_scale is not None:
        p = float(per_tensor_scale)
    scales = _round_scale(spread * p, scale_dtype)
    divisor = scales.float()[..., None]
    if symmetric:
        codes = (groups * p / divisor).round().clamp(-LARGEST, LARGEST) + SYMMETRIC_ZERO
        offsets = None
    else:
        offsets = (low * p).to(scale_dtype)
        codes = ((groups * p - offsets.float()[..., None]) / divisor).round().clamp(0, 15)
    flat = codes.to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    return Int4Weight(pack_codes(flat), scales, offsets, (weight.shape[0], weight.shape[1]), group_size, p)
