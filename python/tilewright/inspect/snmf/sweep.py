# SPDX-License-Identifier: Apache-2.0
"""One sweep of semi-nonnegative factorisation A ~ Z Y, Y >= 0, with few neurons a feature.

A [d, n], Z [d, k], Y [k, n]; the equations are those of Ding, Li and Jordan (TPAMI 2010) with F = Z, G = Y^T.
The reconstruction Z Y is never formed, and Z is kept as m entries a column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.inspect.snmf.matrix import Features

FLOOR = 1e-12
"""Denominators are floored at this times the token's largest |P|."""
RATIO_LIMIT = 1e12
_BLOCK = 4096


def solve_features(ay: Tensor, gram: Tensor, reg: float) -> Tensor:
    """Step a: Z^T = (Y Y^T + reg I)^-1 (A Y^T)^T, float64 [k, d].

    ay: A Y^T, float64 [d, k]. gram: Y Y^T, float64 [k, k]. A matrix that is not positive definite (reg = 0) is
    inverted on its range.
    """
    ridge = gram + reg * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(ridge)
    if int(failed):
        return torch.linalg.pinv(ridge, hermitian=True) @ ay.T
    return torch.cholesky_solve(ay.T, factor)


def winner_take_all(zt: Tensor, keep: int) -> Features:
    """Step b: the ``keep`` entries of largest magnitude of every row of Z^T [k, d]; among equals the first.

    Exactly ``keep`` entries stay, so no feature has more neurons than asked for.
    """
    k, width = zt.shape
    if keep >= width:
        return Features(torch.arange(width, device=zt.device).expand(k, width), zt, width)
    size = zt.abs()
    least = size.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    kept = size >= least
    if int(kept.sum()) != k * keep:
        above = size > least
        ties = kept & ~above
        kept = above | (ties & (ties.cumsum(1) <= keep - above.sum(1, keepdim=True)))
    index = kept.nonzero()[:, 1].view(k, keep)
    return Features(index, zt.gather(1, index), width)


def refit(features: Features, ay: Tensor, gram: Tensor, reg: float) -> Features:
    """Every neuron's row of Z solved again on the features that kept it, [k, m] values; the loss can only fall.

    Rows have few survivors: they are solved together, padded to the longest.
    """
    mask = torch.zeros(len(gram), features.width, dtype=torch.bool, device=gram.device)
    mask = mask.scatter_(1, features.index, True).T
    longest = int(mask.sum(1).max())
    order = mask.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :longest]
    valid = mask.gather(1, order)
    both = valid[:, :, None] & valid[:, None, :]
    eye = torch.eye(longest, dtype=gram.dtype, device=gram.device)
    systems = torch.where(both, gram[order[:, :, None], order[:, None, :]] + reg * eye, eye)
    wanted = torch.where(valid, ay.gather(1, order), 0.0)
    rows = torch.linalg.solve(systems, wanted)
    z = torch.zeros_like(ay).scatter_(1, order, torch.where(valid, rows, 0.0))
    return Features(features.index, z.T.gather(1, features.index), features.width)


def update_coefficients(y: Tensor, p: Tensor, q: Tensor, out: Tensor | None = None) -> tuple[Tensor, float, Tensor]:
    """Step d and what the loss needs: Y <- Y sqrt((P+ + Q- Y) / (P- + Q+ Y)) with X+- = (|X| +- X) / 2.

    y, p: [k, n], p = Z^T A. q: Z^T Z, float64 [k, k]. One pass over the tokens in blocks that stay in the cache.

    Returns the new Y [k, n] (in ``out`` if given), sum(P Y) and Y Y^T (float64 [k, k]), both of the new Y.
    """
    k, n = y.shape
    parts = torch.cat([(-q).clamp(min=0), q.clamp(min=0)]).to(y.dtype)
    out = torch.empty_like(y) if out is None else out
    cross = 0.0
    gram = torch.zeros(k, k, dtype=torch.float64, device=y.device)
    for start in range(0, n, _BLOCK):
        some = slice(start, start + _BLOCK)
        yb, pb = y[:, some], p[:, some]
        both = parts @ yb
        floor = (pb.abs().amax(0) * FLOOR).clamp_(min=torch.finfo(y.dtype).tiny)
        above = both[:k].add_(pb.clamp(min=0))
        below = torch.maximum(both[k:].sub_(pb.clamp(max=0)), floor)
        new = above.div_(below).clamp_(max=RATIO_LIMIT).sqrt_().mul_(yb)
        cross += float((new * pb).sum(dtype=torch.float64))
        wide = new.double()
        gram += wide @ wide.T
        out[:, some] = new
    return out, cross, gram


def descend(y: Tensor, p: Tensor, q: Tensor, passes: int) -> Tensor:
    """Coordinate descent on ||a - Z y||^2 over y >= 0: each coefficient of Y [k, n] in turn to its minimum.

    p: Z^T A [k, n]. q: Z^T Z [k, k]. A feature that is zero has coefficients of zero. Stops before ``passes`` when
    no coefficient of a block moves by more than eps^(2/3) of the block's largest.
    """
    y, q = y.clone(), q.to(y.dtype)
    inverse = torch.where(q.diagonal() > 0, 1 / q.diagonal(), 0.0)
    for start in range(0, y.shape[1], _BLOCK):
        yb, pb = y[:, start : start + _BLOCK], p[:, start : start + _BLOCK]
        for _ in range(passes):
            before = yb.clone()
            for j in range(len(q)):
                yb[j] = (yb[j] + (pb[j] - q[j] @ yb) * inverse[j]).clamp_(min=0)
            if float((yb - before).abs().max()) <= torch.finfo(y.dtype).eps ** (2 / 3) * float(yb.max()):
                break
    return y * (inverse > 0)[:, None]


def loss(squared: float, cross: float, q: Tensor, gram: Tensor) -> float:
    """||A - Z Y||^2 = ||A||^2 - 2 sum(P Y) + sum((Z^T Z) (Y Y^T)), in float64; never below 0."""
    return max(squared - 2 * cross + float((q * gram).sum()), 0.0)
