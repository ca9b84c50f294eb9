# SPDX-License-Identifier: Apache-2.0
"""What the claims of the linear-attention family compare with: relative errors, gradients, times in turn."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; the plain norm of the difference where `want` is zero."""
    got, want = got.detach().double(), want.detach().double()
    difference, size = (got - want).norm(), want.norm()
    return float(difference / size if size > 0 else difference)


def worst(got: Mapping[str, Tensor | None], want: Mapping[str, Tensor | None]) -> float:
    """The largest relative error over tensors of the same names; infinite where one side lacks a tensor."""
    if got.keys() != want.keys():
        raise ValueError(f"names differ: {sorted(got)} and {sorted(want)}")
    errors = [0.0]
    for name, a in got.items():
        b = want[name]
        errors.append(float("inf") if a is None or b is None else relative(a, b))
    return max(errors)


def gradients(outputs: Iterable[Tensor], inputs: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor | None]:
    """Gradient of one fixed random projection of all `outputs` by every input, as `d<name>`."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for out in outputs:
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        terms.append((out * weight.to(out.dtype)).sum())
    found = torch.autograd.grad(torch.stack(terms).sum(), list(inputs.values()), allow_unused=True)
    return {f"d{name}": g for name, g in zip(inputs, found, strict=True)}


def medians_in_turn(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each work, all taken in turn `rounds` times after one warm-up call each.

    Taking turns spreads whatever else the machine does over all of them: ratios of one call are comparable.
    """
    samples: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in samples.items()}


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`function(item)` of every item in order, in `workers` fresh processes of one thread each; 1: in this one."""
    if workers <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, items)


def cores() -> int:
    """How many processes of one thread this process may keep busy."""
    return len(os.sched_getaffinity(0))
