# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: each group of columns gets the scale of its largest value, nothing is calibrated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from tilewright._progress import track
from tilewright.capture import Batch
from tilewright.formats import quantize_int4
from tilewright.models.language_model import LanguageModel, linear_names
from tilewright.quantize._config import require_one_of, strict
from tilewright.quantize._model import keeps_weights, quantized, require_unquantized


@dataclass(frozen=True)
class RTNConfig:
    """weights: "int4" rounds, "keep" leaves low-bit weights as they are, "auto" keeps if there are any.

    group_size: columns that share a scale, a multiple of 16. symmetric: 15 levels around zero, or 16
    levels with a minimum per group. activations: "fp8" or "int8". kv_bits: 4 or 16.

    Raises:
        ValueError: a field has a value that is not allowed; the message names it.
    """

    weights: str = "auto"
    group_size: int = 128
    scale_dtype: str = "bfloat16"
    symmetric: bool = True
    activations: str = "fp8"
    kv_bits: int = 4

    def __post_init__(self) -> None:
        require_one_of("RTNConfig", "weights", self.weights, ("auto", "int4", "keep"))
        require_one_of("RTNConfig", "scale_dtype", self.scale_dtype, ("bfloat16", "float16", "float32"))
        require_one_of("RTNConfig", "symmetric", self.symmetric, (True, False))
        require_one_of("RTNConfig", "activations", self.activations, ("fp8", "int8"))
        require_one_of("RTNConfig", "kv_bits", self.kv_bits, (4, 16))
        if type(self.group_size) is not int or self.group_size < 16 or self.group_size % 16:
            raise ValueError(f"RTNConfig: group_size={self.group_size!r}; a positive multiple of 16 is needed")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` restores an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Any) -> RTNConfig:
        """The inverse of :meth:`to_dict`; missing keys take their defaults, unknown ones raise ValueError."""
        return cls(**strict(cls, raw))


def quantize_model(
    model: LanguageModel,
    config: RTNConfig | None = None,
    calibration_batches: Iterable[Batch] | None = None,  # noqa: ARG001
) -> LanguageModel:
    """Every linear of the decoder layers rounded to INT4; the calibration batches are not looked at.

    Raises:
        ValueError: the model is already quantized by a method, or a weight is not finite.
    """
    config = config or RTNConfig()
    require_unquantized(model)
    names = list(linear_names(model.config))
    changed = {}
    if not keeps_weights(model, config.weights):
        dtype = getattr(torch, config.scale_dtype)
        for name in track(names, "rounding"):
            changed[name] = quantize_int4(model.dense(name), config.group_size, dtype, symmetric=config.symmetric)
    settings = {"activations": config.activations, "mode": "exact", "kv_bits": config.kv_bits}
    return quantized(model, changed, method="rtn", config=config.to_dict(), settings=settings, notes=[])
