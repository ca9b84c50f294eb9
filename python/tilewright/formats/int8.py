# SPDX-License-Identifier: Apache-2.0
"""INT8 weights in groups of 32 with a float16 scale: the exact form of GGUF's Q8_0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUP = 32


@dataclass(frozen=True)
class Int8Weight:
    """A matrix [N, K] with value = code * scale of its group of 32 columns.

    codes: int8 [N, K], K a multiple of 32. scales: float16 [N, K/32].

    Raises:
        ValueError: a dtype or shape is another.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.dim() != 2 or self.codes.shape[1] % GROUP:
            raise ValueError(
                f"Int8Weight: codes are {self.codes.dtype} {list(self.codes.shape)}; int8 [N, K] with K a "
                f"multiple of {GROUP} is needed"
            )
        need = (self.codes.shape[0], self.codes.shape[1] // GROUP)
        if self.scales.dtype != torch.float16 or tuple(self.scales.shape) != need:
            raise ValueError(
                f"Int8Weight: scales are {self.scales.dtype} {list(self.scales.shape)}; float16 {list(need)} is needed"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.numel() + 2 * self.scales.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K]; each product is formed in float32 and then cast."""
        n, k = self.shape
        grouped = self.codes.view(n, k // GROUP, GROUP).to(torch.float32)
        return grouped.mul_(self.scales.to(torch.float32).unsqueeze(-1)).view(n, k).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantized rows [*index.shape, K]: an embedding lookup that never forms the whole matrix."""
        flat = index.reshape(-1)
        return Int8Weight(self.codes[flat], self.scales[flat]).dequantize(dtype).view(*index.shape, self.shape[1])

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Named parts for a safetensors file."""
        return {f"{prefix}.codes": self.codes, f"{prefix}.scales": self.scales}

    def metadata(self) -> dict[str, Any]:
        """What besides the tensors a file must record."""
        return {"format": "int8", "shape": list(self.shape), "group_size": GROUP}

    @classmethod
    def from_tensors(cls, prefix: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Int8Weight:
        """Inverse of :meth:`to_tensors` and :meth:`metadata`; raises ValueError where they disagree."""
        for part in ("codes", "scales"):
            if f"{prefix}.{part}" not in tensors:
                raise ValueError(f"Int8Weight: tensor {prefix}.{part} is missing")
        weight = cls(tensors[f"{prefix}.codes"], tensors[f"{prefix}.scales"])
        if metadata != weight.metadata():
            raise ValueError(f"Int8Weight: {prefix} is recorded as {metadata}, its tensors are {weight.metadata()}")
        return weight
