# SPDX-License-Identifier: Apache-2.0
"""Laws of activation sparsity over training (arXiv 2411.02335, section 4): the limit, and when a ratio is reached.

With D the training tokens (in units of 1e9) and A the activation ratio:

    relu:  A(D) = exp(-c D^alpha + b) + A0    falls to A0
    silu:  A(D) = -c / D^alpha + A0           rises to A0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Kind = Literal["relu", "silu"]
KINDS: tuple[Kind, ...] = ("relu", "silu")
UNIT = 1e9
# A law says nothing about ten times the tokens that it was fitted to.
REACH = 10.0
_LEAST_POINTS = 8
_ALPHAS = (0.2, 0.5, 1.0, 1.5)
_OFFSETS = (-1.0, -3.0, -4.0)
_LEAST = 1e-12
# Evaluations of a refit, which starts at the optimum of nearly the same points.
_REFIT_CALLS = 300


class UnreachableError(ValueError):
    """The ratio asked for lies beyond the limit of the law."""


@dataclass(frozen=True)
class Law:
    """A fitted law. Token counts are plain numbers of tokens; ``params`` are for D in ``unit``.

    kind: "relu" or "silu". params: alpha, c, A0, and b for relu. covariance: of the parameters in the order of
    ``params``. interval: 95 % bootstrap interval of A0 (None without bootstrap). aic: Akaike's criterion by form that
    was fitted; the smaller the better. residual: root mean square of the relative residuals. range: fewest and most
    tokens that were fitted.
    """

    kind: Kind
    params: dict[str, float]
    covariance: list[list[float]]
    interval: tuple[float, float] | None
    aic: dict[str, float]
    residual: float
    range: tuple[float, float]
    unit: float = UNIT

    @property
    def limit(self) -> float:
        """A0, the ratio after endless training."""
        return self.params["A0"]

    def ci(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of the limit.

        Raises:
            ValueError: the law was fitted with bootstrap=0.
        """
        if self.interval is None:
            raise ValueError("this law was fitted with bootstrap=0; fit it with a few hundred")
        return self.interval

    def predict(self, tokens: float | Sequence[float] | Array, *, extrapolate: bool = False) -> Any:
        """A at token counts; a number for a number, an array for several.

        Raises:
            ValueError: a count is not positive, or above 10 times the largest fitted one without ``extrapolate``.
        """
        counts = np.asarray(tokens, np.float64)
        self._within(counts, extrapolate)
        values = _CURVES[self.kind](counts / self.unit, **self.params)
        return float(values) if counts.ndim == 0 else values

    def derivative(self, tokens: float | Sequence[float] | Array, *, extrapolate: bool = False) -> Any:
        """dA/dD, a token (not a unit). Errors as :meth:`predict`."""
        counts = np.asarray(tokens, np.float64)
        self._within(counts, extrapolate)
        d, alpha, c = counts / self.unit, self.params["alpha"], self.params["c"]
        if self.kind == "relu":
            values = -c * alpha * d ** (alpha - 1) * np.exp(-c * d**alpha + self.params["b"]) / self.unit
        else:
            values = c * alpha * d ** (-alpha - 1) / self.unit
        return float(values) if counts.ndim == 0 else values

    def tokens_to(self, ratio: float, *, extrapolate: bool = False) -> float:
        """Training tokens at which the law gives ``ratio``.

        Raises:
            UnreachableError: the ratio lies at or beyond the limit, or before the law's beginning.
            ValueError: the answer is above 10 times the largest fitted count without ``extrapolate``.
        """
        alpha, c, limit = self.params["alpha"], self.params["c"], self.limit
        gap = ratio - limit if self.kind == "relu" else limit - ratio
        if not gap > 0:
            raise UnreachableError(f"ratio={ratio!r} is unreachable: the law's limit is {limit:.4g}")
        power = (self.params["b"] - math.log(gap)) / c if self.kind == "relu" else c / gap
        if not power > 0:
            raise UnreachableError(f"ratio={ratio!r} is unreachable: the law starts below it")
        tokens = float(power ** (1 / alpha) * self.unit)
        self._within(np.asarray(tokens), extrapolate)
        return tokens

    def _within(self, counts: Array, extrapolate: bool) -> None:
        if not np.all(counts > 0):
            raise ValueError("token counts must be positive")
        top = float(counts.max()) if counts.size else 0.0
        if top > REACH * self.range[1] and not extrapolate:
            raise ValueError(
                f"{top:.3g} tokens are more than {REACH:g} times the {self.range[1]:.3g} that the law was fitted to; "
                "pass extrapolate=True to have it all the same"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "interval": None if self.interval is None else list(self.interval),
                "range": list(self.range), "limit": self.limit}  # fmt: skip


def _relu(d: Array, alpha: float, c: float, A0: float, b: float) -> Array:
    return np.exp(-c * d**alpha + b) + A0


def _silu(d: Array, alpha: float, c: float, A0: float) -> Array:
    return -c / d**alpha + A0


_CURVES: dict[str, Callable[..., Array]] = {"relu": _relu, "silu": _silu}


def fit_activation_law(
    tokens: Sequence[float] | Array,
    ratio: Sequence[float] | Array,
    kind: Literal["relu", "silu", "auto"] = "auto",
    *,
    unit: float = UNIT,
    bootstrap: int = 200,
    seed: int = 0,
) -> Law:
    """Fit a law to activation ratios measured along a training run, by Levenberg-Marquardt on relative residuals.

    tokens: training tokens of each checkpoint, at least 8, warm-up left out (its checkpoints bend the curve).
    ratio: activation ratio of each, in (0, 1], measured with one tail error for all (:func:`joint_cett_ppl`).
    kind: the form, or "auto" for the one of smaller AIC.
    unit: tokens in a unit of D; 1e9 as in the paper, or the order of your run where that is far from it.
    bootstrap: refits to resampled residuals for the interval of A0; 0 for none.

    Raises:
        ValueError: fewer than 8 points, lengths differ, values are out of range, or no start converges.
        ImportError: scipy is not installed (``pip install tilewright[sparsify]``).
    """
    d, a = _points(tokens, ratio, unit)
    if kind not in (*KINDS, "auto"):
        raise ValueError(f"kind={kind!r}: 'relu', 'silu' or 'auto' is needed")
    forms = KINDS if kind == "auto" else (kind,)
    fits = {form: _best_fit(form, d, a) for form in forms}
    aic: dict[str, float] = {form: _aic(residuals, len(theta)) for form, (theta, residuals, _) in fits.items()}
    form = min(fits, key=lambda one: aic[one])
    theta, residuals, jacobian = fits[form]
    interval = _bootstrap(form, d, a, theta, bootstrap, seed) if bootstrap else None
    return Law(
        form,
        _natural(form, theta),
        _covariance(form, theta, residuals, jacobian),
        interval,
        aic,
        float(np.sqrt(np.mean(residuals**2))),
        (float(d.min() * unit), float(d.max() * unit)),
        unit,
    )


def _points(tokens: Any, ratio: Any, unit: float) -> tuple[Array, Array]:
    counts, a = np.asarray(tokens, np.float64), np.asarray(ratio, np.float64)
    if counts.ndim != 1 or counts.shape != a.shape:
        raise ValueError(f"tokens has shape {list(counts.shape)}, ratio {list(a.shape)}; two equal lists are needed")
    if len(counts) < _LEAST_POINTS:
        raise ValueError(f"{len(counts)} points; at least {_LEAST_POINTS} checkpoints are needed for a law")
    if not (np.all(np.isfinite(counts)) and np.all(counts > 0) and unit > 0):
        raise ValueError("tokens and unit must be positive and finite")
    if not (np.all(a > 0) and np.all(a <= 1)):
        raise ValueError("ratio must lie in (0, 1]; give activation ratios, not percent or sparsity")
    return counts / unit, a


# The fit is in theta = (ln alpha, ln c, ln A0[, b]), which keeps alpha, c and A0 positive.
def _natural(form: Kind, theta: Array) -> dict[str, float]:
    alpha, c, limit = (float(value) for value in np.exp(np.clip(theta[:3], -700, 700)))
    return {"alpha": alpha, "c": c, "A0": limit} | ({"b": float(theta[3])} if form == "relu" else {})


def _best_fit(
    form: Kind, d: Array, a: Array, starts: list[Array] | None = None, calls: int = 2000
) -> tuple[Array, Array, Array]:
    """theta, relative residuals and their Jacobian of the best of all starts."""
    try:
        from scipy.optimize import least_squares
    except ImportError as wrong:
        raise ImportError("fitting needs scipy; install it with: pip install 'tilewright[sparsify]'") from wrong

    def residuals(theta: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            values = _CURVES[form](d, **_natural(form, theta)) / a - 1
        return np.nan_to_num(values, nan=1e6, posinf=1e6, neginf=-1e6).clip(-1e6, 1e6)

    best = None
    for start in starts or _starts(form, d, a):
        found = least_squares(residuals, start, method="lm", xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=calls)
        if np.all(np.isfinite(found.x)) and (best is None or found.cost < best.cost):
            best = found
    if best is None:
        raise ValueError(f"the {form} law fits these points from no start; look at the curve")
    return best.x, best.fun, best.jac


def _starts(form: Kind, d: Array, a: Array) -> list[Array]:
    """alpha (and b) on a grid; c so that the curve meets the first point, A0 a little beyond the last."""
    first, last = int(np.argmin(d)), int(np.argmax(d))
    starts = []
    for alpha in _ALPHAS:
        if form == "silu":
            limit = a[last] + 0.1 * abs(a[last] - a[first]) + _LEAST
            c = max((limit - a[first]) * d[first] ** alpha, 1e-6)
            starts.append(np.log([alpha, c, limit]))
            continue
        limit = max(a[last] - 0.1 * abs(a[first] - a[last]), 0.1 * a[last])
        for b in _OFFSETS:
            c = max((b - math.log(max(a[first] - limit, _LEAST))) / d[first] ** alpha, 1e-4)
            starts.append(np.array([*np.log([alpha, c, limit]), b]))
    return starts


def _aic(residuals: Array, parameters: int) -> float:
    """n ln(RSS / n) + 2 k, the noise's size counted as a parameter."""
    n = len(residuals)
    return float(n * math.log(max(float(np.sum(residuals**2)) / n, 1e-300)) + 2 * (parameters + 1))


def _covariance(form: Kind, theta: Array, residuals: Array, jacobian: Array) -> list[list[float]]:
    """Of the natural parameters, by the delta method; the pseudo-inverse where a direction is not determined."""
    n, k = jacobian.shape
    scale = float(np.sum(residuals**2)) / max(n - k, 1)
    outer = np.diag([*np.exp(theta[:3]), *([1.0] if form == "relu" else [])])
    covariance: Array = outer @ (scale * np.linalg.pinv(jacobian.T @ jacobian)) @ outer
    return covariance.tolist()


def _bootstrap(form: Kind, d: Array, a: Array, theta: Array, count: int, seed: int) -> tuple[float, float]:
    """2.5 and 97.5 % points of A0 over refits to the curve with resampled relative residuals."""
    fitted = _CURVES[form](d, **_natural(form, theta))
    relative = a / fitted - 1
    random = np.random.default_rng(seed)
    limits = []
    for _ in range(count):
        again = fitted * (1 + relative[random.integers(0, len(a), len(a))])
        refit, _, _ = _best_fit(form, d, np.clip(again, 1e-9, None), [theta], _REFIT_CALLS)
        limits.append(math.exp(refit[2]))
    low, high = np.percentile(limits, [2.5, 97.5])
    return float(low), float(high)
