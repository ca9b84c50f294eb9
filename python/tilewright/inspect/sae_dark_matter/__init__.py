# SPDX-License-Identifier: Apache-2.0
"""The dark matter of sparse autoencoders: their error in a linear and a nonlinear part (arXiv 2410.14670)."""

from __future__ import annotations

from tilewright.inspect.sae_dark_matter.analysis import FVU, R2, VECTORS, SAEErrorAnalysis
from tilewright.inspect.sae_dark_matter.components import component_prediction
from tilewright.inspect.sae_dark_matter.downstream import DownstreamLoss, downstream_loss
from tilewright.inspect.sae_dark_matter.least_squares import LeastSquares, LinearMap
from tilewright.inspect.sae_dark_matter.pursuit import Pursuit, gradient_pursuit, pursue_sae
from tilewright.inspect.sae_dark_matter.scaling import PerToken, ScalingLaw, per_token_predictability, scaling_law
from tilewright.inspect.sae_dark_matter.simulation import Simulation, introduced_error_simulation

__all__ = [
    "FVU",
    "R2",
    "VECTORS",
    "DownstreamLoss",
    "LeastSquares",
    "LinearMap",
    "PerToken",
    "Pursuit",
    "SAEErrorAnalysis",
    "ScalingLaw",
    "Simulation",
    "component_prediction",
    "downstream_loss",
    "gradient_pursuit",
    "introduced_error_simulation",
    "per_token_predictability",
    "pursue_sae",
    "scaling_law",
]
