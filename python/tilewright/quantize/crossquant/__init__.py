# SPDX-License-Identifier: Apache-2.0
"""CrossQuant: activation scales from row and column maxima, folded for integer products (arXiv 2410.07505)."""

from __future__ import annotations

from tilewright.quantize import Method
from tilewright.quantize.crossquant.apply import (
    Choice,
    ColumnAbsMaxObserver,
    LinearInput,
    apply_crossquant_,
    calibrate,
)
from tilewright.quantize.crossquant.config import CrossQuantCheckpointConfig, CrossQuantConfig
from tilewright.quantize.crossquant.fold import Fold, folds_of
from tilewright.quantize.crossquant.linear import CrossQuantLinear
from tilewright.quantize.crossquant.method import quantize_model
from tilewright.quantize.crossquant.report import LayerReport, kernel_report
from tilewright.quantize.crossquant.scales import (
    KernelProportion,
    column_factors,
    crossquant,
    crossquant_scale,
    fake_crossquant,
    per_channel_scale,
    per_token_scale,
    quantization_kernel_proportion,
)
from tilewright.quantize.crossquant.smoothquant import smoothquant_choice

METHOD = Method(
    "crossquant",
    "INT4 weights with columns folded by activation maxima, INT8 activations",
    CrossQuantCheckpointConfig,
    quantize_model,
)

__all__ = [
    "METHOD",
    "Choice",
    "ColumnAbsMaxObserver",
    "CrossQuantCheckpointConfig",
    "CrossQuantConfig",
    "CrossQuantLinear",
    "Fold",
    "KernelProportion",
    "LayerReport",
    "LinearInput",
    "apply_crossquant_",
    "calibrate",
    "column_factors",
    "crossquant",
    "crossquant_scale",
    "fake_crossquant",
    "folds_of",
    "kernel_report",
    "per_channel_scale",
    "per_token_scale",
    "quantization_kernel_proportion",
    "quantize_model",
    "smoothquant_choice",
]
