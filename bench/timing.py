# SPDX-License-Identifier: Apache-2.0
"""Timing on a CPU: rotating buffers, competitors in turn, medians with their spread."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "": 1}
ROUNDS = 5
PAUSE = 0.01  # seconds until the threads of the work before have gone to sleep


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) * UNITS[match[2]])
    return max(sizes, default=32 << 20)


def copies_beyond_cache(size: int) -> int:
    """How many buffers of `size` bytes, used in turn, make sure that none is still cached at its next use."""
    return max(1, math.ceil(2 * last_level_cache_bytes() / max(size, 1)))


def summary(samples: list[int]) -> dict[str, Any]:
    """Median, 20th and 80th percentile of nanoseconds, and how many there are."""
    if len(samples) == 1:
        return {"median_ns": samples[0], "p20_ns": samples[0], "p80_ns": samples[0], "repetitions": 1}
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    median = statistics.median(samples)
    return {"median_ns": median, "p20_ns": fifths[0], "p80_ns": fifths[3], "repetitions": len(samples)}


class Elapsed(int):
    """Nanoseconds that a work measured by itself, in a process of its own."""


def time_in_turn(works: Mapping[str, Callable[[int], Any]], seconds: float, least: int = 3) -> dict[str, list[int]]:
    """Nanoseconds of every call of each work, all works taken in turn over `ROUNDS` rounds.

    A work gets a running number, by which it picks the next of its rotating buffers; one in another process returns its
    own time, as `Elapsed`. `seconds` is spent on each work in all, at least `least` calls a round. Taking turns spreads
    whatever else the machine does over all of them.
    """
    samples: dict[str, list[int]] = {name: [] for name in works}
    for work in works.values():
        work(0)
    for _ in range(ROUNDS):
        for name, work in works.items():
            time.sleep(PAUSE)
            ends, calls = time.perf_counter() + seconds / ROUNDS, 0
            while calls < least or time.perf_counter() < ends:
                start = time.perf_counter_ns()
                result = work(len(samples[name]))
                took = time.perf_counter_ns() - start
                samples[name].append(int(result) if isinstance(result, Elapsed) else took)
                calls += 1
    return samples
