# SPDX-License-Identifier: Apache-2.0
"""Why a layer fails at low bits: kernel proportion, outlier ratio and output error, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewright.quantize.crossquant.apply import LinearInput
from tilewright.quantize.crossquant.config import ALPHA
from tilewright.quantize.crossquant.linear import CrossQuantLinear, weight_of
from tilewright.quantize.crossquant.scales import (
    column_factors,
    crossquant_scale,
    per_token_scale,
    quantization_kernel_proportion,
)
from tilewright.quantize.crossquant.smoothquant import smooth_factors

METHODS = ("per token", "SmoothQuant", "CrossQuant")


@dataclass(frozen=True)
class LayerReport:
    """One linear on its calibration sample.

    kernel: share of elements rounded to zero, by method ("per token" and "CrossQuant", tight). kernel_nonzero: over
    elements that were not zero. exact_zero: share of zeros. outlier_ratio: max c / median c. sqnr: output signal over
    quantization noise in dB, INT8 weights, by method.
    """

    name: str
    kernel: dict[str, float]
    kernel_nonzero: dict[str, float]
    exact_zero: float
    outlier_ratio: float
    sqnr: dict[str, float]


def kernel_report(
    model: nn.Module, calibration: Mapping[str, LinearInput], *, a_bits: int = 8, alpha: float = ALPHA
) -> list[LayerReport]:
    """A report on every calibrated linear of ``model`` (not yet replaced), in the order of calibration.

    Raises:
        ValueError: a name is no linear of the model.
    """
    return [_layer_report(name, model.get_submodule(name), one, a_bits, alpha) for name, one in calibration.items()]


def _layer_report(name: str, linear: nn.Module, seen: LinearInput, a_bits: int, alpha: float) -> LayerReport:
    x, c, weight = seen.sample, seen.col_absmax, weight_of(linear)
    steps = {
        "per token": per_token_scale(x, a_bits),
        "CrossQuant": crossquant_scale(x, a_bits, alpha, c, "tight"),
    }
    shares = {method: quantization_kernel_proportion(x, step) for method, step in steps.items()}
    factors = {
        "per token": torch.ones_like(c),
        "SmoothQuant": smooth_factors(c, [weight], 0.5),
        "CrossQuant": column_factors(c, alpha),
    }
    return LayerReport(
        name,
        {method: share.all for method, share in shares.items()},
        {method: share.nonzero for method, share in shares.items()},
        shares["per token"].exact_zero,
        float(c.max() / c.median().clamp(min=torch.finfo(c.dtype).tiny)),
        {method: _sqnr(x, weight, factor, a_bits) for method, factor in factors.items()},
    )


def _sqnr(x: Tensor, weight: Tensor, factor: Tensor, a_bits: int) -> float:
    """10 log10 of the output's energy over that of its error, in dB."""
    exact = x @ weight.T
    wrong = CrossQuantLinear(weight, None, factor, a_bits=a_bits)(x) - exact
    tiny = torch.finfo(torch.float32).tiny
    return float(10 * (exact.square().sum().clamp(min=tiny) / wrong.square().sum().clamp(min=tiny)).log10())
