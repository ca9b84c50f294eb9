# SPDX-License-Identifier: Apache-2.0
"""How the error falls with the SAE's width, over all tokens and token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENTS = (-3.0, -0.02)


@dataclass(frozen=True)
class ScalingLaw:
    """FVU(W) = c + a W^m, and what the total is made of.

    stderr: standard errors of (c, a, m) from the fit's curvature, infinite with three points. nonlinear: mean nonlinear
    FVU of the widths, or None where it was not given.
    """

    c: float
    a: float
    m: float
    stderr: tuple[float, float, float]
    nonlinear: float | None = None

    def __call__(self, width: float) -> float:
        return self.c + self.a * width**self.m

    def decompose(self, width: float) -> dict[str, float]:
        """FVU at a width as absent features (shrinks with the width), linear error that stays, and nonlinear error.

        Raises:
            ValueError: the law was fitted without nonlinear FVUs.
        """
        if self.nonlinear is None:
            raise ValueError("the law knows no nonlinear FVU; pass nonlinear= to scaling_law")
        return {
            "absent features": self(width) - self.c,
            "linear error": self.c - self.nonlinear,
            "nonlinear error": self.nonlinear,
        }


def scaling_law(widths: Sequence[float], fvu: Sequence[float], nonlinear: Sequence[float] | None = None) -> ScalingLaw:
    """Fit c + a W^m with c, a >= 0 and m < 0 to FVUs at three widths or more, by least squares of relative errors.

    For a given m the law is linear in (c, a), which are solved exactly under their bounds; m is searched on a grid and
    then refined together with them. nonlinear: nonlinear FVU at the same widths, taken as constant.

    Raises:
        ValueError: fewer than three widths, lengths that differ, or numbers that are not positive.
    """
    import numpy as np
    from scipy.optimize import least_squares

    w, y = np.asarray(widths, dtype=np.float64), np.asarray(fvu, dtype=np.float64)
    if w.ndim != 1 or w.shape != y.shape or len(set(w.tolist())) < 3:
        raise ValueError(
            f"widths has shape {w.shape}, fvu {y.shape}; at least three widths with one FVU each are needed"
        )
    if not (np.all(w > 0) and np.all(y > 0) and np.all(np.isfinite(y))):
        raise ValueError("widths and fvu must be positive and finite")
    if nonlinear is not None and len(nonlinear) != len(w):
        raise ValueError(f"nonlinear has {len(nonlinear)} values for {len(w)} widths; one each is needed")
    reference = float(np.exp(np.log(w).mean()))
    scaled = w / reference
    start = min((_linear_part(scaled, y, m) for m in np.linspace(*EXPONENTS, 150)), key=lambda found: found[0])

    def misses(p: np.ndarray) -> np.ndarray:
        return (p[0] + p[1] * scaled ** p[2]) / y - 1

    first = np.clip(start[1], [0, 1e-12, EXPONENTS[0]], [np.inf, np.inf, EXPONENTS[1]])
    fit = least_squares(misses, first, bounds=([0, 0, EXPONENTS[0]], [np.inf, np.inf, EXPONENTS[1]]), xtol=1e-12)
    c, a, m = (float(v) for v in fit.x)
    size = reference**-m
    freedom = len(w) - 3
    spread = [float("inf")] * 3
    if freedom > 0:
        covariance = np.linalg.pinv(fit.jac.T @ fit.jac) * (2 * fit.cost / freedom)
        spread = np.sqrt(np.diagonal(covariance)).tolist()
    mean = None if nonlinear is None else float(np.mean(np.asarray(nonlinear)))
    return ScalingLaw(c, a * size, m, (spread[0], spread[1] * size, spread[2]), mean)


def _linear_part(scaled: object, y: object, m: float) -> tuple[float, list[float]]:
    """(squared relative error, [c, a, m]) of the best c, a >= 0 for one exponent."""
    import numpy as np
    from scipy.optimize import nnls

    power = np.asarray(scaled) ** m
    found, miss = nnls(np.stack([1 / np.asarray(y), power / np.asarray(y)], 1), np.ones(len(power)))
    return float(miss) ** 2, [float(found[0]), float(found[1]), m]


@dataclass(frozen=True)
class PerToken:
    """For each pair of SAEs i < j, keyed (i, j).

    r2: of ||error_j|| from ||error_i|| with an intercept. gain: share of what is then unexplained that ||nonlinear_i||
    explains in addition, (R2' - R2) / (1 - R2); empty where no nonlinear norms were given.
    """

    r2: dict[tuple[int, int], float]
    gain: dict[tuple[int, int], float]


def per_token_predictability(errors: Sequence[Tensor], nonlinear: Sequence[Tensor] | None = None) -> PerToken:
    """Do the same tokens stay hard when the SAE grows? Norms [n] on the same held-out tokens, smallest SAE first.

    Fits have two or three coefficients, so the score is that of the fitted tokens.

    Raises:
        ValueError: fewer than two SAEs, or norms of other lengths.
    """
    if len(errors) < 2 or len({len(e) for e in [*errors, *(nonlinear or [])]}) != 1:
        raise ValueError("errors must hold the norms of at least two SAEs on the same tokens")
    if nonlinear is not None and len(nonlinear) != len(errors):
        raise ValueError(f"nonlinear has {len(nonlinear)} SAEs, errors {len(errors)}; one each is needed")
    r2, gain = {}, {}
    for i in range(len(errors)):
        for j in range(i + 1, len(errors)):
            alone = _fit_r2([errors[i]], errors[j])
            r2[i, j] = alone
            if nonlinear is not None:
                gain[i, j] = (_fit_r2([errors[i], nonlinear[i]], errors[j]) - alone) / max(1 - alone, 1e-12)
    return PerToken(r2, gain)


def _fit_r2(inputs: list[Tensor], target: Tensor) -> float:
    x = torch.stack([torch.ones(len(target), dtype=torch.float64), *(i.double() for i in inputs)], 1)
    y = target.double()
    missed = y - x @ torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]
    return float(1 - missed.square().sum() / (y - y.mean()).square().sum().clamp_min(1e-300))
