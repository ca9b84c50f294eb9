# SPDX-License-Identifier: Apache-2.0
"""Running statistics over rows of activations, for :func:`tilewright.capture.observe`.

Each takes rows ``x`` [n, ...C] of any floating dtype (computed in float32, sums kept in float64) and
holds memory that does not depend on how many rows it has seen. A reducer that has seen no row raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tilewright.capture import Reducer


class _Running:
    """Counts rows and refuses a result without any."""

    def __init__(self) -> None:
        self.count = 0

    def _seen(self) -> None:
        if self.count == 0:
            raise ValueError(
                f"{type(self).__name__} has seen no activation; every token was masked, or the module never ran"
            )


class AbsMax(_Running):
    """Largest magnitude of each channel: float32 [...C]."""

    _value: Tensor

    def update(self, x: Tensor) -> None:
        if x.shape[0] == 0:
            return
        largest = x.abs().amax(0).float()
        self._value = largest if self.count == 0 else torch.maximum(self._value, largest)
        self.count += x.shape[0]

    def result(self) -> Tensor:
        self._seen()
        return self._value


class MeanAbs(_Running):
    """Mean magnitude of each channel: float64 [...C]."""

    _sum: Tensor

    def update(self, x: Tensor) -> None:
        total = x.float().abs().sum(0, dtype=torch.float64)
        self._sum = total if self.count == 0 else self._sum + total
        self.count += x.shape[0]

    def result(self) -> Tensor:
        self._seen()
        return self._sum / self.count


@dataclass(frozen=True)
class MomentsResult:
    """mean and variance (population) of each channel, float64 [...C], over ``count`` rows."""

    count: int
    mean: Tensor
    variance: Tensor


class Moments(_Running):
    """Mean and variance of each channel by the pairwise update of Chan, Golub and LeVeque (1979)."""

    def update(self, x: Tensor) -> None:
        n = x.shape[0]
        if n == 0:
            return
        x = x.double()
        mean = x.mean(0)
        squares = (x - mean).square().sum(0)
        if self.count == 0:
            self._mean, self._squares = mean, squares
        else:
            total = self.count + n
            delta = mean - self._mean
            self._mean = self._mean + delta * (n / total)
            self._squares = self._squares + squares + delta.square() * (self.count * n / total)
        self.count += n

    def result(self) -> MomentsResult:
        self._seen()
        return MomentsResult(self.count, self._mean, self._squares / self.count)


class Covariance(_Running):
    """Second moments of channels: float64 [C, C], for rows x [n, C].

    centered: subtract the mean (population covariance); otherwise E[x x^T]. Products are summed in
    float32 within one batch, in float64 between batches.
    """

    def __init__(self, centered: bool = True) -> None:
        super().__init__()
        self.centered = centered
        self._products: Tensor | None = None
        self._sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if x.dim() != 2:
            raise ValueError(
                f"Covariance needs rows [n, C], got {list(x.shape)}; flatten the channels in the site's transform"
            )
        x = x.float()
        if self._sum is None or self._products is None:
            # Shifting by the first batch's mean keeps the float32 products small where the mean is large.
            self._shift = x.mean(0) if self.centered and x.shape[0] else torch.zeros_like(x[:0].sum(0))
            self._products = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
            self._sum = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        shifted = x - self._shift
        self._products += (shifted.T @ shifted).double()
        self._sum += shifted.sum(0, dtype=torch.float64)
        self.count += x.shape[0]

    def result(self) -> Tensor:
        self._seen()
        assert self._products is not None
        assert self._sum is not None
        second = self._products / self.count
        if not self.centered:
            return second
        mean = self._sum / self.count
        return second - torch.outer(mean, mean)


@dataclass(frozen=True)
class HistogramResult:
    """counts int64 [bins] between edges float32 [bins + 1]; ``below`` and ``above`` lie outside."""

    counts: Tensor
    edges: Tensor
    below: int
    above: int


class Histogram(_Running):
    """Counts of all values in equal bins of [low, high); the last bin includes ``high``."""

    def __init__(self, low: float, high: float, bins: int = 256) -> None:
        super().__init__()
        if not low < high or bins < 1:
            raise ValueError(f"Histogram(low={low}, high={high}, bins={bins}): need low < high and bins >= 1")
        self.edges = torch.linspace(low, high, bins + 1)
        self._counts = torch.zeros(bins, dtype=torch.int64)
        self._outside = [0, 0]

    def update(self, x: Tensor) -> None:
        values = x.detach().float().cpu().reshape(-1)
        if bool(values.isnan().any()):
            raise ValueError("Histogram: activations hold NaN")
        below, above = values < self.edges[0], values > self.edges[-1]
        inside = values[~(below | above)]
        bins = len(self._counts)
        index = torch.bucketize(inside, self.edges, right=True).sub_(1).clamp_(max=bins - 1)
        self._counts += torch.bincount(index, minlength=bins)
        self._outside[0] += int(below.sum())
        self._outside[1] += int(above.sum())
        self.count += x.shape[0]

    def result(self) -> HistogramResult:
        self._seen()
        return HistogramResult(self._counts, self.edges, *self._outside)


class Reservoir(_Running):
    """A uniform sample of at most ``size`` rows, float32 [<=size, ...C], each row equally likely.

    Every row gets a random key and the ``size`` smallest keys stay: the same sample in whatever
    batches the rows come. ``seed`` fixes the keys.
    """

    _rows: Tensor

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"Reservoir(size={size}): at least 1 is needed")
        self.size = size
        self._keys = torch.empty(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor) -> None:
        if x.shape[0] == 0:
            return
        fresh = torch.rand(x.shape[0], dtype=torch.float64, generator=self._generator)
        keys = torch.cat([self._keys, fresh])
        held = len(self._keys)
        order = torch.argsort(keys)[: self.size]
        old, new = order[order < held], order[order >= held] - held
        rows = x[new.to(x.device)].float()
        self._rows = rows if held == 0 else torch.cat([self._rows[old.to(x.device)], rows])
        self._keys = keys[torch.cat([old, new + held])]
        self.count += x.shape[0]

    def result(self) -> Tensor:
        self._seen()
        return self._rows


class Several:
    """Several reducers on the same rows; the result is the tuple of theirs."""

    def __init__(self, *make: Callable[[], Reducer]) -> None:
        self._parts = [m() for m in make]

    def update(self, x: Tensor) -> None:
        for part in self._parts:
            part.update(x)

    def result(self) -> tuple[Any, ...]:
        return tuple(part.result() for part in self._parts)
