# SPDX-License-Identifier: Apache-2.0
"""Comparison against an oracle within a bound that the caller derives."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-24
"""Largest relative error of one float32 rounding to nearest."""


def assert_within(got: Tensor, oracle: Tensor, bound: Tensor | float, what: str = "result") -> None:
    """Assert |got - oracle| <= bound everywhere, and NaN exactly where the oracle has NaN.

    Raises:
        AssertionError: names the first element out of bounds, both values and the bound.
    """
    if got.shape != oracle.shape:
        raise AssertionError(f"{what} has shape {tuple(got.shape)}, the oracle {tuple(oracle.shape)}")
    got64, oracle64 = got.double(), oracle.double()
    limit = torch.as_tensor(bound, dtype=torch.float64).expand_as(oracle64)
    both_nan = got64.isnan() & oracle64.isnan()
    bad = ~(((got64 - oracle64).abs() <= limit) | both_nan | (got64 == oracle64))
    if bad.any():
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements out of bounds; first at {at}: "
            f"got {float(got64[at]):.9g}, oracle {float(oracle64[at]):.9g}, "
            f"error {float((got64 - oracle64)[at].abs()):.3g}, bound {float(limit[at]):.3g}"
        )
