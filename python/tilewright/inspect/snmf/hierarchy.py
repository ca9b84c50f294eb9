# SPDX-License-Identifier: Apache-2.0
"""Features of features: A ~ Z_L Y_L ... Y_1, every Y non-negative, by factorising the features again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn.functional import softplus

from tilewright._progress import track
from tilewright.inspect.snmf.method import DTYPES, Rows, SemiNMF


@dataclass(frozen=True)
class Level:
    """One level: its estimator, and ``weights`` [k_l, k_(l-1)], the share of every feature below in each of its own.

    Level 1 has no features below it: its ``weights`` is None.
    """

    estimator: SemiNMF
    weights: np.ndarray[Any, Any] | None

    @property
    def components(self) -> Any:
        """Z_l^T, array [k_l, d]."""
        return self.estimator.components_


@dataclass(frozen=True)
class Edge:
    """Feature ``parent`` of level ``level`` holds feature ``child`` of the level below with ``weight``."""

    level: int
    parent: int
    child: int
    weight: float


class HierarchicalSemiNMF(TransformerMixin, BaseEstimator):
    """Level 1 factorises X as :class:`SemiNMF` does, with ranks[0] features; each further level the features below.

    ranks : features of every level, falling. The other parameters are those of :class:`SemiNMF` and hold for each
        level.

    Attributes
    ----------
    levels_ : list of :class:`Level`, level 1 first.
    n_iter_ : sweeps of all levels together.
    n_features_in_ : d.
    """

    def __init__(
        self,
        ranks: Sequence[int] = (400, 200, 100, 50),
        init: str = "random",
        sparsity: float = 0.01,
        max_iter: int = 2000,
        tol: float = 1e-7,
        patience: int = 100,
        reg: float = 1e-6,
        refit_support: bool = False,
        random_state: Any = 0,
        dtype: str = "float32",
        transform_iter: int = 100,
        progress: bool | None = False,
    ) -> None:
        self.ranks = ranks
        self.init = init
        self.sparsity = sparsity
        self.max_iter = max_iter
        self.tol = tol
        self.patience = patience
        self.reg = reg
        self.refit_support = refit_support
        self.random_state = random_state
        self.dtype = dtype
        self.transform_iter = transform_iter
        self.progress = progress

    def fit(self, X: Rows, y: Any = None) -> HierarchicalSemiNMF:  # noqa: ARG002
        """Factorise X [n, d], then its features, level by level.

        Raises:
            ValueError: ranks are not falling positive integers; otherwise as :meth:`SemiNMF.fit`.
        """
        ranks = list(self.ranks)
        if not ranks or any(r < 1 for r in ranks) or any(b >= a for a, b in itertools.pairwise(ranks)):
            raise ValueError(f"ranks={self.ranks!r}: positive integers are needed, each below the one before")
        shared = {k: v for k, v in self.get_params(deep=False).items() if k != "ranks"}
        self.levels_: list[Level] = []
        for rank in ranks:
            estimator = SemiNMF(n_components=rank, **shared)
            if not self.levels_:
                estimator.fit(X)
                self.levels_.append(Level(estimator, None))
                continue
            below = self.levels_[-1].components
            found = estimator._fit(below)
            self.levels_.append(Level(estimator, found.coefficients.cpu().numpy()))
        self.n_features_in_ = self.levels_[0].estimator.n_features_in_
        self.n_iter_ = sum(level.estimator.n_iter_ for level in self.levels_)
        return self

    def transform(self, X: Rows, level: int = -1) -> Any:
        """Coefficients [n, k_l] of the rows of X for the features of a level: those of level 1, carried up the tree.

        A token's coefficient for a feature above is Y_l ... Y_2 times its coefficients below.
        """
        check_is_fitted(self)
        chosen = self._level(level)
        found = self.levels_[0].estimator.transform(X)
        for one in self.levels_[1 : chosen + 1]:
            assert one.weights is not None
            found = found @ (torch.from_numpy(one.weights.T).to(found) if isinstance(found, Tensor) else one.weights.T)
        return found

    def _level(self, level: int) -> int:
        count = len(self.levels_)
        if level == 0 or not -count <= level <= count:
            raise ValueError(f"level={level}: 1 to {count}, or -1 for the last, is needed")
        return level - 1 if level > 0 else count + level

    def tree(self, min_weight: float = 0.5, *, relative: bool = True) -> list[Edge]:
        """Edges from every level to the one below, the heaviest child of each parent first.

        min_weight: an edge needs more than this share of its parent's largest weight, or, with ``relative=False``,
            more than this weight.

        Raises:
            ValueError: min_weight is negative, or a share of 1 or more.
        """
        check_is_fitted(self)
        edges = []
        for number, level in enumerate(self.levels_[1:], 2):
            edges += edges_between(level.weights, number, min_weight, relative=relative)
        return edges

    def fine_tune(self, X: Any, *, steps: int = 500, learning_rate: float = 1e-3) -> list[float]:
        """Adam on the mean squared error of Z_L Y_L ... Y_1 over the rows of X, all factors together.

        Y stays non-negative (it is softplus of what is learned) and Z_L keeps its neurons. Weights between levels and
        the top level's features change; features of lower levels, which are not in the product, stay.

        Returns the mean squared error before every step and after the last.
        """
        check_is_fitted(self)
        if len(self.levels_) < 2:
            raise ValueError("fine_tune needs at least two levels; give two ranks or more")
        rows = torch.as_tensor(X).to(DTYPES[self.dtype])
        top = torch.from_numpy(self.levels_[-1].components).to(rows)
        kept = (top != 0).to(rows.dtype)
        first = torch.as_tensor(self.levels_[0].estimator.transform(rows))
        weights = [torch.from_numpy(level.weights).to(rows) for level in self.levels_[1:]]
        raw = [_inverse_softplus(y).requires_grad_() for y in (first, *weights)]
        top.requires_grad_()
        optimiser = torch.optim.Adam([top, *raw], lr=learning_rate)
        squared = float(rows.double().square().sum())

        def error() -> Tensor:
            up = softplus(raw[0])
            for y in raw[1:]:
                up = up @ softplus(y).T
            features = top * kept
            cross = (features * (up.T @ rows)).sum()
            return (squared - 2 * cross + ((features @ features.T) * (up.T @ up)).sum()) / rows.numel()

        curve = []
        for _ in track(range(steps), "fine-tuning", show=self.progress):
            optimiser.zero_grad()
            now = error()
            now.backward()
            optimiser.step()
            curve.append(float(now.detach()))
        with torch.no_grad():
            curve.append(float(error()))
            self._adopt((top * kept).detach(), [softplus(y).detach() for y in raw[1:]])
        return curve

    def _adopt(self, top: Tensor, weights: list[Tensor]) -> None:
        self.levels_[-1].estimator.components_ = top.cpu().numpy()
        self.levels_[1:] = [
            Level(level.estimator, y.cpu().numpy()) for level, y in zip(self.levels_[1:], weights, strict=True)
        ]


def edges_between(weights: Any, level: int, min_weight: float, *, relative: bool = True) -> list[Edge]:
    """Edges of one level by its weights [k_l, k_(l-1)]; arguments and errors of :meth:`HierarchicalSemiNMF.tree`."""
    if min_weight < 0 or (relative and min_weight >= 1):
        raise ValueError(f"min_weight={min_weight}: a share in [0, 1) is needed, or a weight with relative=False")
    edges = []
    for parent, row in enumerate(weights):
        least = min_weight * float(row.max()) if relative else min_weight
        children = [int(i) for i in np.argsort(-row, kind="stable") if row[i] > least]
        edges += [Edge(level, parent, child, float(row[child])) for child in children]
    return edges


def _inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y; zeros become 1e-4, from where a gradient still reaches them."""
    y = y.clamp(min=1e-4)
    return y + torch.log(-torch.expm1(-y))
