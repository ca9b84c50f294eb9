# SPDX-License-Identifier: Apache-2.0
"""The factorisation: a start, sweeps, the best of them."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright._progress import track
from tilewright.inspect.snmf import sweep
from tilewright.inspect.snmf.matrix import Activations, Features

LOG = logging.getLogger(__name__)
LEAST_START = 1e-6
LEAST_NORM = 1e-8
DESCENTS = 500
"""Passes at most; mostly a few dozen suffice."""


@dataclass(frozen=True)
class Settings:
    """What a factorisation is told; the names are those of :class:`tilewright.inspect.snmf.SemiNMF`."""

    n_components: int
    sparsity: float
    max_iter: int
    tol: float
    patience: int
    reg: float
    refit_support: bool

    def kept(self, width: int) -> int:
        """Neurons of each feature: max(1, ceil(p d))."""
        # p * d of decimal fractions lands a hair above whole numbers: 0.07 * 100 = 7.000000000000001.
        return min(width, max(1, math.ceil(round(self.sparsity * width, 9))))


@dataclass(frozen=True)
class Factors:
    """Z^T [k, d], Y [k, n], the loss after every sweep, and the loss of the pair that is returned."""

    components: Tensor
    coefficients: Tensor
    losses: list[float]
    best: float


def start_random(k: int, n: int, data: Activations, seed: int) -> Tensor:
    """Y [k, n] uniform in (0, 1)."""
    random = torch.Generator().manual_seed(seed)
    return torch.rand(k, n, generator=random, dtype=data.dtype).clamp_(min=LEAST_START).to(data.device)


def start_svd(k: int, data: Activations, seed: int) -> Tensor:
    """Y = sqrt(S) V^T of the k largest singular values, each with the sign that has more positive weight.

    Where A has fewer singular values than k the rest starts at random.
    """
    products = torch.zeros(data.width, data.width, dtype=torch.float64, device=data.device)
    for _, a in data.pieces():
        wide = a.double()
        products += wide @ wide.T
    values, vectors = torch.linalg.eigh(products)
    size = min(k, len(values))
    top = vectors[:, -size:].flip(1).to(data.dtype)
    singular = values[-size:].flip(0).clamp(min=0).sqrt()
    right = torch.cat([top.T @ a for _, a in data.pieces()], 1)
    right = right / singular.clamp(min=torch.finfo(data.dtype).tiny).sqrt()[:, None].to(data.dtype)
    positive = right.clamp(min=0).norm(dim=1) >= right.clamp(max=0).norm(dim=1)
    right = torch.where(positive[:, None], right, -right)
    if size < k:
        right = torch.cat([right, start_random(k - size, data.tokens, data, seed)])
    return right.clamp_(min=LEAST_START)


def start_kmeans(k: int, data: Activations, seed: int, offset: float) -> Tensor:
    """Y = one-hot of 15 Lloyd iterations on the tokens, plus ``offset``: an update that multiplies revives no zero."""
    from sklearn.cluster import KMeans

    if data.streamed:
        raise ValueError("init='kmeans' needs X in one piece; give init='random' or 'svd' with blocks")
    ((_, a),) = data.pieces()
    rows = a.T.cpu().numpy()
    model = KMeans(min(k, len(rows)), init="random", n_init=1, max_iter=15, random_state=seed)
    labels = torch.from_numpy(model.fit_predict(rows)).long().to(data.device)
    y = torch.full((k, data.tokens), offset, dtype=data.dtype, device=data.device)
    y[labels, torch.arange(data.tokens, device=data.device)] += 1
    return y.clamp_(min=LEAST_START)


def factorise(data: Activations, y: Tensor, settings: Settings, *, progress: bool | None = False) -> Factors:
    """Sweeps from Y [k, n] (not changed) until ``max_iter`` or ``patience``; the factors of the least loss.

    Raises:
        RuntimeError: the loss is not finite after a sweep.
    """
    k = y.shape[0]
    if data.squared == 0:
        zero = torch.zeros(k, data.width, dtype=data.dtype, device=data.device)
        return Factors(zero, torch.zeros_like(y), [0.0], 0.0)
    buffers = [torch.empty_like(y), torch.empty_like(y), torch.empty_like(y)]
    wide = y.double()
    gram = wide @ wide.T
    del wide
    losses: list[float] = []
    best, best_features, best_y, waited = math.inf, None, y, 0
    for number in track(range(1, settings.max_iter + 1), "factorising", show=progress):
        now = one_sweep(data, y, gram, settings, _free(buffers, y, best_y))
        if not math.isfinite(now.loss):
            raise RuntimeError(f"sweep {number}: the loss is {now.loss}; scale X down or give dtype='float64'")
        losses.append(now.loss)
        waited = 0 if now.loss < best * (1 - settings.tol) else waited + 1
        if now.loss < best:
            best, best_features, best_y = now.loss, now.features, now.y
        if waited >= max(settings.patience, 1) or now.loss == 0:
            break
        y, gram = now.y, now.gram
        dead = (gram.diagonal() <= LEAST_NORM**2).nonzero()[:, 0]
        if len(dead):
            y, gram = revive(data, now, dead, number)
    assert best_features is not None
    return Factors(best_features.dense(), best_y, losses, best)


@dataclass(frozen=True)
class Swept:
    """After a sweep: Z, Y [k, n], P^T = Z^T A [k, n], Q = Z^T Z and Y Y^T (float64 [k, k]), ||A - Z Y||^2."""

    features: Features
    y: Tensor
    p: Tensor
    q: Tensor
    gram: Tensor
    loss: float


def one_sweep(data: Activations, y: Tensor, gram: Tensor, settings: Settings, out: Tensor | None = None) -> Swept:
    """Steps a to e from Y [k, n] and its Gram matrix; the new Y lies in ``out``, which must not be Y."""
    features = next_features(data, y, gram, settings)
    norms = gram.diagonal().sqrt().clamp(min=LEAST_NORM)
    features = features.scaled(norms)
    q, p = features.gram(), data.project(features)
    scaled = torch.div(y, norms[:, None].to(y.dtype), out=torch.empty_like(y) if out is None else out)
    new, cross, gram = sweep.update_coefficients(scaled, p, q, out=scaled)
    return Swept(features, new, p, q, gram, sweep.loss(data.squared, cross, q, gram))


def _free(buffers: list[Tensor], *taken: Tensor) -> Tensor:
    return next(b for b in buffers if all(b is not t for t in taken))


def next_features(data: Activations, y: Tensor, gram: Tensor, settings: Settings) -> Features:
    """Steps a and b for Y [k, n] and its Gram matrix."""
    keep = settings.kept(data.width)
    ay = data.times(y)
    zt = sweep.solve_features(ay, gram, settings.reg)
    if keep >= data.width:
        return sweep.winner_take_all(zt.to(data.dtype), keep)
    features = sweep.winner_take_all(zt, keep)
    if settings.refit_support:
        features = sweep.refit(features, ay, gram, settings.reg)
    return Features(features.index, features.value.to(data.dtype), features.width)


def revive(data: Activations, now: Swept, dead: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Features that no token uses get the tokens of largest residual; a copy of Y [k, n] and its Gram matrix."""
    wide = now.y.double()
    residual = data.column_squares - 2 * (wide * now.p).sum(0) + (wide * (now.q @ wide)).sum(0)
    worst = residual.topk(min(len(dead), len(residual))).indices
    y = now.y.clone()
    for feature, token in zip(dead.tolist(), worst.tolist(), strict=False):
        LOG.info("sweep %d: feature %d is used by no token; it starts again from token %d", number, feature, token)
        answer = data.responses(data.column(token)).clamp_(min=0)
        y[feature] = answer / answer.norm().clamp(min=LEAST_NORM) + LEAST_START
    wide = y.double()
    return y, wide @ wide.T


def coefficients(features: Tensor, data: Activations, iterations: int) -> Tensor:
    """Y [k, n] for fixed Z^T [k, d]: step d from a start that depends on nothing but the token itself, then descent.

    Step d nears the bounds and the optimum at a linear rate only; a few passes of exact minimisation along each
    coefficient end what is left, and give zeros that are zero.
    """
    k, width = features.shape
    index = torch.arange(width, device=features.device).expand(k, width)
    fixed = Features(index, features.to(data.device, data.dtype), width)
    q = fixed.gram()
    p = data.project(fixed)
    start = p.clamp(min=0).sum(0) / q.clamp(min=0).sum().to(p.dtype).clamp(min=torch.finfo(p.dtype).tiny)
    y = start.clamp(min=LEAST_START).expand(k, -1).contiguous()
    for _ in range(iterations):
        y = sweep.update_coefficients(y, p, q, out=y)[0]
    return sweep.descend(y, p, q, DESCENTS)
