# SPDX-License-Identifier: Apache-2.0
"""Sparsing Law: how sparse activations are (CETT-PPL-p%), and where training takes them (arXiv 2411.02335)."""

from __future__ import annotations

from tilewright.sparsify.sparsing_law.cett import TailError
from tilewright.sparsify.sparsing_law.laws import Law, UnreachableError, fit_activation_law
from tilewright.sparsify.sparsing_law.measurement import METRICS, Measurement, Pass
from tilewright.sparsify.sparsing_law.method import (
    JointCett,
    apply_thresholds,
    cett_ppl,
    cett_thresholds,
    joint_cett_ppl,
    pareto,
    sparsity,
)
from tilewright.sparsify.sparsing_law.neurons import FeedForward, feed_forwards
from tilewright.sparsify.sparsing_law.report import SparsityReport, export_thresholds
from tilewright.sparsify.sparsing_law.shapes import (
    FrequencyBins,
    ScaleTrend,
    TokenAgreement,
    WidthDepth,
    compare_tokens,
    fit_scale,
    fit_width_depth,
    frequency_distribution,
)

__all__ = [
    "METRICS",
    "FeedForward",
    "FrequencyBins",
    "JointCett",
    "Law",
    "Measurement",
    "Pass",
    "ScaleTrend",
    "SparsityReport",
    "TailError",
    "TokenAgreement",
    "UnreachableError",
    "WidthDepth",
    "apply_thresholds",
    "cett_ppl",
    "cett_thresholds",
    "compare_tokens",
    "export_thresholds",
    "feed_forwards",
    "fit_activation_law",
    "fit_scale",
    "fit_width_depth",
    "frequency_distribution",
    "joint_cett_ppl",
    "pareto",
    "sparsity",
]
