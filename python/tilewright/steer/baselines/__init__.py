# SPDX-License-Identifier: Apache-2.0
"""Steering methods with a closed form, place by place."""

from __future__ import annotations

from tilewright.steer import Method
from tilewright.steer.baselines.closed_forms import (
    AtOnceConfig,
    LinActConfig,
    SequentialConfig,
    aura,
    diffmean,
    gaussian_act,
    iti_c,
    lin_act,
    mean_act,
)

METHODS = (
    Method("diffmean", "DiffMean, ActAdd, CAA: add the difference of means", AtOnceConfig, diffmean),
    Method("iti_c", "ITI-C: add a linear classifier's normal, as long as the projections spread", AtOnceConfig, iti_c),
    Method("mean_act", "Mean-AcT: shift the mean, layer after layer", SequentialConfig, mean_act),
    Method("gaussian_act", "Gaussian-AcT: match mean and standard deviation", SequentialConfig, gaussian_act),
    Method("lin_act", "Linear-AcT: the affine map between sorted samples", LinActConfig, lin_act),
    Method("aura", "AurA: dampen coordinates that tell source from target", AtOnceConfig, aura),
)

__all__ = [
    "METHODS",
    "AtOnceConfig",
    "LinActConfig",
    "SequentialConfig",
    "aura",
    "diffmean",
    "gaussian_act",
    "iti_c",
    "lin_act",
    "mean_act",
]
