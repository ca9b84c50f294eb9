# SPDX-License-Identifier: Apache-2.0
"""Oracle of CETT (arXiv 2402.03804, 2411.02335): sums of neuron vectors, thresholds from all sorted norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SILENT = 1e-12


def neuron_vectors(h: Tensor, weight: Tensor) -> Tensor:
    """n_i = Wo[:, i] h_i for each token: h [T, m] and Wo [d, m] to [T, m, d]."""
    return h[:, :, None] * weight.T[None]


def cett(h: Tensor, weight: Tensor, eps: float) -> float:
    """Mean over tokens of || sum of n_i with ||n_i|| < eps || / || sum of all n_i ||; sums below 1e-12 are left out."""
    vectors = neuron_vectors(h, weight)
    weak = vectors.norm(dim=-1) < eps
    whole = vectors.sum(1).norm(dim=-1)
    heard = whole >= SILENT
    if not bool(heard.any()):
        return 0.0
    tail = torch.where(weak[..., None], vectors, torch.zeros_like(vectors)).sum(1).norm(dim=-1)
    return float((tail[heard] / whole[heard]).mean())


def cett_threshold(h: Tensor, weight: Tensor, target: float) -> float:
    """The largest eps up to which CETT never exceeds ``target``, of all distinct neuron norms and infinity.

    Between two neighbouring norms CETT is constant, so only those places matter: neurons join the truncated sums one by
    one in the order of their norms. At least the smallest positive norm.
    """
    vectors = neuron_vectors(h, weight)
    norms = vectors.norm(dim=-1)
    whole = vectors.sum(1).norm(dim=-1)
    heard = whole >= SILENT
    sums, ratios = torch.zeros_like(vectors[:, 0]), torch.zeros_like(whole)
    best: float | None = None
    order = norms.flatten().argsort(stable=True).tolist()
    values = norms.flatten().tolist()
    for place, index in enumerate(order):
        value = values[index]
        if value > 0 and (place == 0 or value > values[order[place - 1]]):
            if best is not None and float(ratios.sum()) > target * int(heard.sum()):
                return best
            best = value
        token, neuron = divmod(index, h.shape[1])
        if heard[token]:
            sums[token] += vectors[token, neuron]
            ratios[token] = sums[token].norm() / whole[token]
    if best is None or float(ratios.sum()) <= target * int(heard.sum()):
        return math.inf
    return best
