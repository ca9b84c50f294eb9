# SPDX-License-Identifier: Apache-2.0
"""Ternary weights: quantization, packings, and the layouts of other programs. Layouts: csrc/format/ternary.h."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

TernaryFormat = Literal["q2", "t3w", "t5", "mma2", "i2_s", "tq1_0", "tq2_0", "hf"]
FORMATS: tuple[TernaryFormat, ...] = ("q2", "t3w", "t5", "mma2", "i2_s", "tq1_0", "tq2_0", "hf")
"""In the order of their numbers in a packed header."""
HEADER_BYTES = 64
DEVICE_FORMAT: TernaryFormat = "mma2"
"""What the CUDA kernels read."""
MIN_ABSMEAN = 1e-5
_BLOCK = 256


def _ops() -> Any:
    from tilewright import _native

    _native.require()
    return torch.ops.tilewright


def quantize_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight `[N, K]` to {-1, 0, 1} by its mean magnitude, as BitNet b1.58 does (arXiv 2402.17764).

    Returns:
        int8 codes `[N, K]` and the scale, float32 `[1]`: weight ~ codes * scale.

    Raises:
        ValueError: weight has a NaN or an infinity, or is no matrix.
    """
    if weight.dim() != 2:
        raise ValueError(f"quantize_ternary: weight has shape {tuple(weight.shape)}, needed [N, K]")
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise ValueError("quantize_ternary: weight has a NaN or an infinity")
    mean = weight.abs().mean() if weight.numel() else weight.new_zeros(())
    scale = mean.clamp(min=MIN_ABSMEAN)
    return (weight / scale).round().clamp(-1, 1).to(torch.int8), scale.reshape(1)


@dataclass(frozen=True)
class PackedTernary:
    """A ternary matrix as kernels or other programs read it: a 64-byte header (magic, format, shape) and data.

    Attributes:
        data: uint8, one-dimensional; on the CPU, or, of format "mma2", on a CUDA device.
        shape: (N, K).
        format: which packing.
        scale: float32 `[1]` or `[N]`: the weight is the ternary values times this.
    """

    data: Tensor
    shape: tuple[int, int]
    format: TernaryFormat
    scale: Tensor

    @property
    def id(self) -> int:
        """The packing's number in operators."""
        return FORMATS.index(self.format)

    @property
    def nbytes(self) -> int:
        return self.data.numel() + self.scale.numel() * self.scale.element_size()

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def payload(self) -> Tensor:
        """The data behind the header: for a foreign format, that program's own bytes."""
        return self.data[HEADER_BYTES:]

    def unpack(self) -> Tensor:
        """int8 `[N, K]` of -1, 0, 1."""
        values: Tensor = _ops().ternary_unpack(self.data, *self.shape, self.id)
        return values

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]`, unpacked and scaled."""
        return self.unpack().to(dtype) * self.scale.to(dtype).reshape(-1, 1)

    def convert(self, format: TernaryFormat) -> PackedTernary:
        """The same weight in another packing, on the CPU."""
        if format == self.format:
            return self
        return pack_ternary(self.unpack().cpu(), format, scale=self.scale.cpu())

    def to(self, device: torch.device | str) -> PackedTernary:
        """On another device: a CUDA device gets format "mma2", whatever this one is."""
        target = torch.device(device)
        if target.type == self.device.type == "cpu":
            return self
        source = self.convert(DEVICE_FORMAT) if target.type == "cuda" and self.format != DEVICE_FORMAT else self
        return PackedTernary(source.data.to(target), source.shape, source.format, source.scale.to(target))

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Tensors for a safetensors file: `prefix.ternary` and `prefix.scale`. The header carries the rest."""
        return {f"{prefix}.ternary": self.data.cpu(), f"{prefix}.scale": self.scale.cpu()}

    def metadata(self) -> dict[str, Any]:
        """What a file records besides the tensors; their header says the same."""
        return {"format": "ternary", "packing": self.format, "shape": list(self.shape)}

    @classmethod
    def from_tensors(
        cls, prefix: str, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None
    ) -> PackedTernary:
        """The inverse of `to_tensors` and, where it is given, of `metadata`.

        Raises:
            ValueError: a tensor is missing, or the metadata say something else than the tensors.
            RuntimeError: the data are not a packed ternary weight of this version.
        """
        names = [f"{prefix}.ternary", f"{prefix}.scale"]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"{prefix}: tensors {missing} are missing")
        data = tensors[names[0]].contiguous()
        n, k, packing = _ops().ternary_describe(data)
        weight = cls(data, (n, k), FORMATS[packing], _checked_scale(tensors[names[1]], n))
        if metadata is not None and metadata != weight.metadata():
            raise ValueError(f"{prefix} is recorded as {metadata}, its tensors are {weight.metadata()}")
        return weight


def _checked_scale(scale: Tensor | float | None, rows: int) -> Tensor:
    if scale is None:
        return torch.ones(1)
    tensor = torch.as_tensor(scale, dtype=torch.float32).detach().reshape(-1).clone()
    if tensor.numel() not in (1, rows):
        raise ValueError(f"scale has {tensor.numel()} values, needed 1 or N = {rows}")
    return tensor


def pack_ternary(
    weight: Tensor,
    format: TernaryFormat | Literal["auto"] = "auto",
    *,
    scale: Tensor | float | None = None,
    tokens: int = 1,
) -> PackedTernary:
    """Pack int8 `[N, K]` of -1, 0, 1.

    Args:
        weight: any shape of matrix for "q2", "t3w", "t5", "mma2" and "hf"; "i2_s" needs K in multiples of 128, "tq1_0"
            and "tq2_0" of 256. A weight on a CUDA device is packed as "mma2" and stays there under "auto".
        format: "q2" (2 bits, any number of tokens), "t3w" (1.78 bits, table lookup), "t5" (1.6 bits, for storage),
            "mma2" (2 bits, CUDA); "i2_s" (bitnet.cpp), "tq1_0", "tq2_0" (llama.cpp), "hf" (transformers' BitNet).
            "auto" measures once for each class of shapes whether q2 or t3w is faster here.
        scale: `[1]`, `[N]` or a number: what the ternary values are multiplied by; 1 when None.
        tokens: with "auto": how many tokens a call will bring.

    Raises:
        RuntimeError: weight has another dtype or a value that is not ternary, or K does not suit the format.
        ValueError: the format is unknown or scale has neither 1 nor N values.
    """
    device = weight.device
    if format == "auto":
        if device.type == "cuda":
            format = DEVICE_FORMAT
        else:
            n, k = weight.shape if weight.dim() == 2 else (0, 0)
            format = FORMATS[_ops().ternary_fastest(n, k, tokens)]
    if format not in FORMATS:
        raise ValueError(f"pack_ternary: format = {format!r}, needed 'auto' or one of {FORMATS}")
    rows = weight.shape[0] if weight.dim() == 2 else 0
    scales = _checked_scale(scale, rows).cpu()
    block_scales = scales.to(torch.float16).expand(rows).contiguous() if format in ("tq1_0", "tq2_0") else None
    data = _ops().ternary_pack(weight.cpu(), block_scales, FORMATS.index(format))
    packed = PackedTernary(data, (rows, weight.shape[1]), format, scales)
    return packed.to(device) if device.type == "cuda" and format == DEVICE_FORMAT else packed


def wrap_ternary(
    payload: Tensor, shape: tuple[int, int], format: TernaryFormat, scale: Tensor | float | None = None
) -> PackedTernary:
    """A weight that another program has packed: its bytes, checked, behind our header.

    Args:
        payload: uint8, in any shape: "i2_s" `N * K / 4` bytes; "tq1_0" and "tq2_0" the tensor's GGUF blocks; "hf"
            `[ceil(N/4), K]`.
        shape: (N, K).
        format: which program's.
        scale: what the values are multiplied by. For "tq1_0" and "tq2_0" it comes from the blocks when None.

    Raises:
        RuntimeError: payload has another number of bytes, or a code that stands for nothing.
        ValueError: blocks of a row of "tq1_0" or "tq2_0" have different scales, which one scale a row cannot express.
    """
    data = _ops().ternary_wrap(payload.reshape(-1), *shape, FORMATS.index(format))
    if scale is None and format in ("tq1_0", "tq2_0"):
        scale = _row_scales(data)
    return PackedTernary(data, shape, format, _checked_scale(scale, shape[0]))


def _row_scales(data: Tensor) -> Tensor:
    blocks: Tensor = _ops().ternary_block_scales(data).float()
    if blocks.numel() == 0:
        return torch.ones(1)
    # Writers give a block of zeros the scale zero, which says nothing about the row.
    first = blocks.amax(-1, keepdim=True)
    if bool((blocks == 0).any()):
        n, k, packing = _ops().ternary_describe(data)
        empty = (_ops().ternary_unpack(data, n, k, packing).view(n, -1, _BLOCK) == 0).all(-1)
        blocks = torch.where((blocks == 0) & empty, first.expand_as(blocks), blocks)
    if not torch.equal(blocks, first.expand_as(blocks)):
        row = int((blocks != first).any(-1).nonzero()[0])
        raise ValueError(
            f"row {row} has blocks of different scales ({float(blocks[row].min()):.4g} to "
            f"{float(blocks[row].max()):.4g}); its weight is not ternary with one scale a row"
        )
    return first[:1, 0] if torch.equal(first, first[:1].expand_as(first)) else first[:, 0]
