# SPDX-License-Identifier: Apache-2.0
"""Quantiles of magnitudes: exact, or streamed in constant memory. Reducers for :func:`tilewright.capture.observe`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Positive floats are ordered as their bits: 13 bits of mantissa make 8192 bins an octave, between 2^-27 and 2^16.
# SiLU has a minimum of -0.278, where magnitudes lie dense: a few hundred bins an octave would put whole percents of
# them into one.
_SHIFT = 10
_LOWEST = (127 - 27) << 23 >> _SHIFT
_BINS = (27 + 16) << 23 >> _SHIFT


def check_share(k: float) -> float:
    """``k`` itself.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0.0 <= k < 1.0:
        raise ValueError(f"sparsity = {k}, needed a share of at least 0 and below 1")
    return float(k)


class Magnitudes:
    """All magnitudes, kept: ``quantile(k)`` is the value of rank ceil(k n) of n, 0 for k = 0."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take any tensor of finite values."""
        self._parts.append(_magnitudes(x))

    def result(self) -> Magnitudes:
        """Itself: what is asked for comes later."""
        return self

    @property
    def count(self) -> int:
        """How many values."""
        return sum(len(part) for part in self._parts)

    def quantile(self, k: float) -> float:
        """The threshold that drops a share k of the values."""
        rank = _rank(check_share(k), self.count)
        if rank == 0:
            return 0.0
        values = torch.cat(self._parts)
        self._parts = [values]
        return float(values.kthvalue(rank).values)

    def __add__(self, other: Magnitudes) -> Magnitudes:
        both = Magnitudes()
        both._parts = [*self._parts, *other._parts]
        return both


class LogHistogram:
    """Counts of magnitudes in 8192 bins an octave from 2^-27 to 2^16: 2.8 MB, however many values.

    ``quantile(k)`` lies in the bin of the value of rank ceil(k n), at its share of the bin's width: within 0.012 % of
    it.
    What is below 2^-27 counts as zero, what is above 2^16 as that.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        """Take any tensor of finite values."""
        bins = (_magnitudes(x).view(torch.int32) >> _SHIFT) - _LOWEST
        self._counts += torch.bincount(bins.clamp_(0, _BINS - 1), minlength=_BINS)

    def result(self) -> LogHistogram:
        """Itself."""
        return self

    @property
    def count(self) -> int:
        """How many values."""
        return int(self._counts.sum())

    def quantile(self, k: float) -> float:
        """The threshold that drops about a share k of the values."""
        rank = _rank(check_share(k), self.count)
        if rank == 0:
            return 0.0
        upto = self._counts.cumsum(0)
        index = int(torch.searchsorted(upto, rank))
        if index == 0:
            return 0.0
        low, high = (
            float(torch.tensor((i + _LOWEST) << _SHIFT, dtype=torch.int32).view(torch.float32))
            for i in (index, index + 1)
        )
        before = int(upto[index]) - int(self._counts[index])
        return low + (high - low) * (rank - before - 0.5) / int(self._counts[index])

    def __add__(self, other: LogHistogram) -> LogHistogram:
        both = LogHistogram()
        both._counts = self._counts + other._counts
        return both


def _rank(k: float, count: int) -> int:
    if count == 0:
        raise ValueError("no activation was seen; every token was masked, or the module never ran")
    # k n is a product of rounded numbers: what is a whole number up to that is one.
    return min(math.ceil(k * count - 1e-9 * count), count)


def _magnitudes(x: Tensor) -> Tensor:
    values = x.detach().abs().to("cpu", torch.float32).reshape(-1)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("activations hold NaN or infinite values; the model or its input is damaged")
    return values
