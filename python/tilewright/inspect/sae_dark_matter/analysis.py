# SPDX-License-Identifier: Apache-2.0
"""The error of an SAE in two parts: what is linear in the activation, and what is not.

SaeError(x) = x - Sae(x); LinearError(x) = B x (+ c), the least-squares prediction of the error from the activation;
NonlinearError = SaeError - LinearError. B is fitted on some tokens and everything is measured on others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tilewright.inspect.sae.rows import Rows
from tilewright.inspect.sae_dark_matter.least_squares import LeastSquares, LinearMap

VECTORS = ("x", "sae", "error", "sae+nonlinear", "linear", "nonlinear")
ROBUST_CHANNELS = 3


@dataclass(frozen=True)
class FVU:
    """Fractions of the activations' variance, sum ||v||^2 / sum ||x - mean x||^2 over the evaluation tokens.

    sae: v the whole error. nonlinear: its nonlinear part; linear: the difference. normalized_mse: mean over tokens of
    ||error||^2 / ||x||^2. l0: mean number of active latents.
    """

    sae: float
    nonlinear: float
    normalized_mse: float
    l0: float

    @property
    def linear(self) -> float:
        return self.sae - self.nonlinear


@dataclass(frozen=True)
class R2:
    """How much of the error is linear in the activation.

    r2_global: 1 - FVU.nonlinear / FVU.sae, the linear share. r2_dim_mean: R^2 of each output dimension, averaged;
    constant_dims were left out of it. shuffled: r2_global where the errors were dealt to other tokens, the score of no
    relation. shrinkage: the scalar g that fits x - b ~ g (Sae(x) - b) best; r2_rescaled: the linear share of the error
    that is left after rescaling by it.
    """

    r2_global: float
    r2_dim_mean: float
    constant_dims: int
    shuffled: float
    shrinkage: float
    r2_rescaled: float


class SAEErrorAnalysis:
    """Fits the linear error on ``x_train`` and measures on ``x_test``; only sums and some numbers a token are kept.

    sae: anything with ``encode(x)`` and ``decode(latents)``. x_train, x_test: rows [n, d], a tensor or
    :class:`~tilewright.inspect.sae.Rows`; the second must not be among the first. intercept: fit c as well.
    ridge: of the regression, relative; needed below five tokens a dimension. shuffle_seed: of the control.

    Raises:
        ValueError: too few tokens, other widths, or NaN (the token is named).
    """

    def __init__(
        self,
        sae: Any,
        x_train: Tensor | Rows,
        x_test: Tensor | Rows,
        *,
        intercept: bool = False,
        ridge: float | None = None,
        shuffle_seed: int = 0,
    ) -> None:
        self.sae, self.intercept, self.ridge = sae, intercept, ridge
        self.train = x_train if isinstance(x_train, Rows) else Rows(x_train)
        self.test = x_test if isinstance(x_test, Rows) else Rows(x_test)
        if self.train.width != self.test.width:
            raise ValueError(
                f"x_train has rows of {self.train.width}, x_test of {self.test.width}; need the same width"
            )
        self._generator = torch.Generator().manual_seed(shuffle_seed)
        self._fit()

    def _fit(self) -> None:
        """One pass over the fitting tokens."""
        d = self.train.width
        fit = LeastSquares(d, d + 1, intercept=self.intercept, ridge=self.ridge)
        control = LeastSquares(d, d, intercept=self.intercept, ridge=self.ridge)
        bias = getattr(self.sae, "b_dec", None)
        center = torch.zeros(d, dtype=torch.float64) if bias is None else bias.detach().double().cpu()
        squares = torch.zeros(d, dtype=torch.float64)
        overlap = energy = 0.0
        for x, recon, _ in self.passes(self.train):
            error = x - recon
            # The last column is the constant 1: how well a linear map without intercept imitates it.
            fit.update(x, torch.cat([error, torch.ones(len(x), 1)], 1))
            control.update(x, error[torch.randperm(len(x), generator=self._generator)])
            squares += x.double().square().sum(0)
            seen = recon.double() - center
            overlap += float(((x.double() - center) * seen).sum())
            energy += float(seen.square().sum())
        both = fit.solve()
        self.B = LinearMap(both.weight[:d], both.bias[:d])
        self._one = LinearMap(both.weight[d:], both.bias[d:])
        self._control = control.solve()
        spread = squares - fit.x.square() / fit.count
        self.loud_channels = spread.topk(min(ROBUST_CHANNELS, d - 1)).indices
        self.shrinkage = overlap / energy if energy > 0 else 1.0
        self._center = center

    @torch.no_grad()
    def passes(self, rows: Rows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x [n, d], Sae(x) [n, d], L0 [n]) of each block."""
        for x in rows.blocks():
            yield (x, *apply_sae(self.sae, x))

    def linear_error(self, x: Tensor) -> Tensor:
        """B x (+ c): [..., d]."""
        return self.B(x)

    @torch.no_grad()
    def nonlinear_error(self, x: Tensor) -> Tensor:
        """x - Sae(x) - LinearError(x): [..., d]."""
        return x - apply_sae(self.sae, x)[0] - self.linear_error(x)

    @cached_property
    def _sums(self) -> _Sums:
        """One pass over the evaluation tokens."""
        sums = _Sums(self.test.width)
        g, center = self.shrinkage, self._center
        for x, recon, l0 in self.passes(self.test):
            wide, error = x.double(), (x - recon).double()
            shuffled = error[torch.randperm(len(x), generator=self._generator)]
            # LinearError of the rescaled error x - b - g (recon - b) follows from B: no second regression is needed.
            rescaled = g * error + (1 - g) * (wide - center)
            linear = self.B(wide)
            rescaled_linear = g * linear + (1 - g) * (wide - self._one(wide) * center)
            sums.add(
                x=wide,
                error=error,
                nonlinear=error - linear,
                shuffled=shuffled - self._control(wide),
                rescaled=rescaled,
                rescaled_nonlinear=rescaled - rescaled_linear,
                l0=l0,
            )
        return sums

    def fvu(self, *, robust: bool = False) -> FVU:
        """Fractions of variance unexplained; robust leaves out the three channels of largest variance."""
        return self._sums.fvu(self._channels(robust))

    def r2(self, *, robust: bool = False) -> R2:
        """The linear share of the error, its control, and what shrinkage has to do with it."""
        return self._sums.r2(self._channels(robust), self.shrinkage)

    def _channels(self, robust: bool) -> Tensor:
        kept = torch.ones(self.test.width, dtype=torch.bool)
        if robust:
            kept[self.loud_channels] = False
        return kept

    @property
    def error_norms(self) -> Tensor:
        """||SaeError|| of each evaluation token: float64 [n]."""
        return torch.cat(self._sums.error_norms)

    @property
    def nonlinear_norms(self) -> Tensor:
        """||NonlinearError|| of each evaluation token: float64 [n]."""
        return torch.cat(self._sums.nonlinear_norms)

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        """The six vectors whose norms are predicted, for rows x [n, d]; their names are VECTORS."""
        recon = apply_sae(self.sae, x)[0]
        error = x - recon
        linear = self.linear_error(x)
        nonlinear = error - linear
        made = (x, recon, error, recon + nonlinear, linear, nonlinear)
        return dict(zip(VECTORS, made, strict=True))

    @torch.no_grad()
    def norm_prediction(self, *, intercept: bool = False, robust: bool = False) -> dict[str, float]:
        """R^2 on the evaluation tokens of ||v||^2 predicted linearly from x, for the six vectors.

        Two passes: one over the fitting tokens, one over the others. intercept: the reference has none.
        """
        kept = self._channels(robust)
        fit = LeastSquares(self.train.width, len(VECTORS), intercept=intercept, ridge=self.ridge)
        for x in self.train.blocks():
            fit.update(x, self._squares(x, kept))
        prediction = fit.solve()
        score = Score(len(VECTORS))
        for x in self.test.blocks():
            score.add(self._squares(x, kept), prediction(x.double()))
        return dict(zip(VECTORS, score.r2().tolist(), strict=True))

    def _squares(self, x: Tensor, kept: Tensor) -> Tensor:
        return torch.stack([v[:, kept].double().square().sum(1) for v in self.parts(x).values()], 1)

    @torch.no_grad()
    def baselines(
        self,
        token_ids: tuple[Tensor, Tensor] | None = None,
        losses: tuple[Tensor, Tensor] | None = None,
        *,
        squared: bool = True,
    ) -> dict[str, float]:
        """R^2 on the evaluation tokens of the error's squared norm (or norm) from less than the activation.

        From the mean over the same token id, from L0, from the (squared) norm of x and from the model's loss on the
        token; each with an intercept, fitted on the fitting tokens.

        token_ids, losses: (of the fitting tokens [n_train], of the evaluation tokens [n_test]).
        """
        power = 2 if squared else 1
        sides = []
        for rows in (self.train, self.test):
            parts = [(x.double().norm(dim=1), (x - r).double().norm(dim=1), l0) for x, r, l0 in self.passes(rows)]
            norm, error, l0 = (torch.cat(column) for column in zip(*parts, strict=True))
            sides.append((norm**power, error**power, l0.double()))
        (norm, target, l0), (test_norm, test_target, test_l0) = sides
        found = {
            "norm of x": line_r2(norm, target, test_norm, test_target),
            "L0": line_r2(l0, target, test_l0, test_target),
        }
        if losses is not None:
            one, other = (_aligned("losses", v, len(t)) for v, t in zip(losses, (target, test_target), strict=True))
            found["model loss"] = line_r2(one.double(), target, other.double(), test_target)
        if token_ids is not None:
            ids, other = (
                _aligned("token_ids", v, len(t)) for v, t in zip(token_ids, (target, test_target), strict=True)
            )
            found["token id"] = _id_r2(ids, target, other, test_target)
        return found


class _Sums:
    """Sums of squares for each dimension over the evaluation tokens."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.active = self.ratio = 0.0
        self.sum_x = torch.zeros(width, dtype=torch.float64)
        self.sum_error = torch.zeros(width, dtype=torch.float64)
        self.squares: dict[str, Tensor] = {}
        self.error_norms: list[Tensor] = []
        self.nonlinear_norms: list[Tensor] = []

    def add(self, *, l0: Tensor, **vectors: Tensor) -> None:
        for name, v in vectors.items():
            squares = v.square().sum(0)
            self.squares[name] = self.squares[name] + squares if name in self.squares else squares
        self.count += len(l0)
        self.active += float(l0.sum())
        self.sum_x += vectors["x"].sum(0)
        self.sum_error += vectors["error"].sum(0)
        norms = vectors["error"].square().sum(1)
        self.ratio += float((norms / vectors["x"].square().sum(1).clamp_min(1e-30)).sum())
        self.error_norms.append(norms.sqrt())
        self.nonlinear_norms.append(vectors["nonlinear"].norm(dim=1))

    def _total(self, name: str, kept: Tensor) -> float:
        return float(self.squares[name][kept].sum())

    def fvu(self, kept: Tensor) -> FVU:
        spread = float((self.squares["x"] - self.sum_x.square() / self.count)[kept].sum())
        if not spread > 0:
            raise ValueError("x_test: all rows are equal, so there is no variance to explain; give other rows")
        return FVU(
            self._total("error", kept) / spread,
            self._total("nonlinear", kept) / spread,
            self.ratio / self.count,
            self.active / self.count,
        )

    def r2(self, kept: Tensor, shrinkage: float) -> R2:
        def share(part: str, whole: str) -> float:
            total = self._total(whole, kept)
            return 1 - self._total(part, kept) / total if total > 0 else 1.0

        spread = self.squares["error"] - self.sum_error.square() / self.count
        # A constant dimension's sum of squares differs from 0 only by rounding, of the order of its squares.
        varying = (spread > 1e-12 * self.squares["error"].clamp_min(1e-300)) & kept
        by_dim = 1 - self.squares["nonlinear"][varying] / spread[varying]
        return R2(
            share("nonlinear", "error"),
            float(by_dim.mean()) if len(by_dim) else float("nan"),
            int((kept & ~varying).sum()),
            share("shuffled", "error"),
            shrinkage,
            share("rescaled_nonlinear", "rescaled"),
        )


class Score:
    """R^2 of predictions of several numbers, summed over batches."""

    def __init__(self, outputs: int) -> None:
        self.count = 0
        self.total = torch.zeros(outputs, dtype=torch.float64)
        self.squares = torch.zeros(outputs, dtype=torch.float64)
        self.missed = torch.zeros(outputs, dtype=torch.float64)

    def add(self, target: Tensor, predicted: Tensor) -> None:
        """Rows [n, outputs] of both."""
        target = target.double()
        self.count += len(target)
        self.total += target.sum(0)
        self.squares += target.square().sum(0)
        self.missed += (target - predicted.double()).square().sum(0)

    def spread(self) -> Tensor:
        return self.squares - self.total.square() / self.count

    def r2(self) -> Tensor:
        """1 - sum of squared misses / sum of squares about the mean, for each: float64 [outputs]."""
        return 1 - self.missed / self.spread()


def apply_sae(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(Sae(x), L0) of any object with ``encode`` and ``decode``, without a dense matrix of latents where it can."""
    if hasattr(sae, "reconstruct"):
        recon, l0 = sae.reconstruct(x)
    else:
        latents = sae.encode(x)
        recon, l0 = sae.decode(latents), (latents != 0).sum(-1)
    if recon.shape != x.shape:
        raise ValueError(f"sae returned {list(recon.shape)} for activations {list(x.shape)}; the same shape is needed")
    return recon.to(x.dtype), l0


def line_r2(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """R^2 on the test pairs of y ~ a x + b fitted on the others; a constant x predicts the mean."""
    centered = x - x.mean()
    slope = (centered * (y - y.mean())).sum() / centered.square().sum().clamp_min(1e-300)
    predicted = y.mean() + slope * (test_x - x.mean())
    return float(1 - (test_y - predicted).square().sum() / (test_y - test_y.mean()).square().sum())


def _id_r2(ids: Tensor, y: Tensor, test_ids: Tensor, test_y: Tensor) -> float:
    """R^2 of the mean of y over the same id; ids that were not seen get the mean of all."""
    known, place = torch.unique(ids, return_inverse=True)
    sums = torch.zeros(len(known), dtype=torch.float64).index_add_(0, place, y)
    means = sums / torch.bincount(place, minlength=len(known))
    found = torch.searchsorted(known, test_ids.contiguous()).clamp_max(len(known) - 1)
    predicted = torch.where(known[found] == test_ids, means[found], y.mean())
    return float(1 - (test_y - predicted).square().sum() / (test_y - test_y.mean()).square().sum())


def _aligned(name: str, values: Tensor, count: int) -> Tensor:
    if values.shape != (count,):
        raise ValueError(f"{name} has shape {list(values.shape)}; one value a token, [{count}], is needed")
    return values


__all__ = ["FVU", "R2", "VECTORS", "LinearMap", "SAEErrorAnalysis", "Score", "apply_sae", "line_r2"]
