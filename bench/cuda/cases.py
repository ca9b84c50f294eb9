# SPDX-License-Identifier: Apache-2.0
"""What a benchmark on a CUDA device is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Methods = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class GpuCase:
    """One comparison: methods that compute the same thing, and what the hardware must at least do for it.

    Attributes:
        name: Unique; starts with the kernel's name.
        make: Called on the device; allocates the inputs and returns the methods by name, `tilewright` among them. A
            peer that is not installed is left out. Where the case is bound by memory, each method takes its inputs in
            turn from enough copies that the last-level cache holds none of them at its next use.
        bytes: Least traffic with device memory of one call.
        operations: Multiplications and additions of one call.
        peak: Which measured ceiling `operations` is held against: "bf16", "fp8" or "int8".
        calls: How many calls of a method make one graph: where inputs rotate, at least the number of copies.
        note: What to know when reading the result.
    """

    name: str
    make: Callable[[], Methods]
    bytes: int
    operations: float
    peak: str = "bf16"
    calls: int = 8
    note: str = ""
