# SPDX-License-Identifier: Apache-2.0
"""Two properties by which Hedgehog judges an attention: spikiness and monotonicity (arXiv 2402.04347, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_entropy(weights: Tensor, *, causal: bool = True) -> Tensor:
    """Mean entropy of attention rows, ``-sum_j a_ij ln a_ij`` in nats: the lower, the spikier.

    Args:
        weights: ``[..., T, T]``, rows that sum to 1; entries of 0 count nothing.
        causal: leave out row 0, whose only weight is 1 in every attention.

    Returns:
        ``[...]`` (all dimensions but the last two), float64.
    """
    _square(weights, "weights")
    a = weights.double()
    entropy = -torch.special.xlogy(a, a).sum(-1)
    return entropy[..., int(causal) :].mean(-1)


def monotonicity(logits: Tensor, weights: Tensor, *, causal: bool = True) -> Tensor:
    """Mean Spearman correlation, row by row, of ``q_i . k_j`` and ``a_ij``: 1 where weights rise with the products.

    Tied values share their mean rank; a row of equal weights counts as 0. Rows with fewer than three visible keys are
    left out: their correlation says nothing.

    Args:
        logits: ``[..., T, T]``, the teacher's ``q_i . k_j`` (any scale).
        weights: of the same shape.
        causal: row i sees keys j <= i only.

    Returns:
        ``[...]``, float64 in [-1, 1]; NaN when no row has three keys.
    """
    _square(logits, "logits")
    if logits.shape != weights.shape:
        raise ValueError(f"weights has shape {list(weights.shape)}, logits {list(logits.shape)}; they must be equal")
    size = logits.shape[-1]
    seen = torch.ones(size, size, dtype=torch.bool, device=logits.device)
    seen = seen.tril() if causal else seen
    first = 2 if causal else (0 if size >= 3 else size)
    x, y = (_centred_ranks(values[..., first:, :], seen[first:]) for values in (logits, weights))
    norms = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    products = (x * y).sum(-1)
    return torch.where(norms > 0, products / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0).mean(-1)


def _centred_ranks(values: Tensor, seen: Tensor) -> Tensor:
    """Ranks (ties: their mean) of each row's visible entries minus the row's mean rank; 0 elsewhere."""
    values = values.double().masked_fill(~seen, torch.inf)
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values.contiguous())
    upto = torch.searchsorted(ordered, values.contiguous(), right=True)
    ranks = (below + upto - 1).double() / 2
    count = seen.sum(-1, keepdim=True)
    return torch.where(seen, ranks - (count - 1).double() / 2, 0.0)


def _square(x: Tensor, name: str) -> None:
    if x.dim() < 2 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name} has shape {list(x.shape)}, needed [..., T, T]")
