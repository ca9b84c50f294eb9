# SPDX-License-Identifier: Apache-2.0
"""Oracle of CETT (arXiv 2402.03804, 2411.02335): neuron vectors summed one by one, thresholds from all sorted norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def neuron_vectors(h: Tensor, weight: Tensor) -> Tensor:
    """n_i = Wo[:, i] h_i for each token: h [T, m] and Wo [d, m] to [T, m, d]."""
    return h[:, :, None] * weight.T[None]


def cett(h: Tensor, weight: Tensor, eps: float) -> float:
    """Mean over tokens of || sum of n_i with ||n_i|| < eps || / || sum of all n_i ||; sums below 1e-12 are left out."""
    ratios = []
    for vectors in neuron_vectors(h, weight):
        whole = float(vectors.sum(0).norm())
        if whole < 1e-12:
            continue
        weak = [vector for vector in vectors if float(vector.norm()) < eps]
        ratios.append(float(torch.stack(weak).sum(0).norm()) / whole if weak else 0.0)
    return sum(ratios) / len(ratios) if ratios else 0.0


def cett_threshold(h: Tensor, weight: Tensor, target: float) -> float:
    """The largest eps up to which CETT never exceeds ``target``, of all distinct neuron norms and infinity.

    Between two neighbouring norms CETT is constant, so only those places matter. At least the smallest positive norm.
    """
    norms = neuron_vectors(h, weight).norm(dim=-1).flatten().unique().tolist()
    places = [norm for norm in norms if norm > 0] + [math.inf]
    best = places[0]
    for place in places:
        if cett(h, weight, place) > target:
            break
        best = place
    return best
