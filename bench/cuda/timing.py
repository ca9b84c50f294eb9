# SPDX-License-Identifier: Apache-2.0
"""Timing on a CUDA device: calls captured in a graph where they can be, device events, methods in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

ROUNDS = 7
ROUND_MS = 12.0


def described(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _captured(work: Callable[[], Any], calls: int) -> tuple[Callable[[], None], bool]:
    """A function that does `calls` calls, and whether it is one replay of a graph."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
    except RuntimeError:  # a peer that synchronises cannot be captured: it is timed as its users run it
        torch.cuda.synchronize()

        def eager() -> None:
            for _ in range(calls):
                work()

        return eager, False
    return graph.replay, True


def _milliseconds(run: Callable[[], None], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def time_in_turn(works: Mapping[str, Callable[[], Any]], calls: int = 8) -> dict[str, dict[str, Any]]:
    """Median, least and greatest nanoseconds of a call of each work over `ROUNDS` rounds, and whether it was a graph.

    `calls` calls make one graph, so that the gaps between launches do not count. A work that fails is reported with its
    error; the others are timed.
    """
    prepared: dict[str, tuple[Callable[[], None], bool, int]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, work in works.items():
        try:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(3):
                    work()
            side.synchronize()
            run, graph = _captured(work, calls)
            run()
            torch.cuda.synchronize()
            once = _milliseconds(run, 1)
            prepared[name] = (run, graph, max(1, round(ROUND_MS / max(once, 1e-3))))
        except Exception as error:
            results[name] = {"error": described(error)}
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(ROUNDS):
        for name, (run, _, repeats) in prepared.items():
            samples[name].append(1e6 * _milliseconds(run, repeats) / calls)
    for name, found in samples.items():
        results[name] = {
            "median_ns": statistics.median(found),
            "least_ns": min(found),
            "greatest_ns": max(found),
            "graph": prepared[name][1],
        }
    return results


def ceilings() -> dict[str, float]:
    """What this device reaches: bytes a second of a large copy (read and written), operations a second of products."""
    source = torch.empty(1 << 29, dtype=torch.float32, device="cuda").uniform_()
    target = torch.empty_like(source)
    copies = {"kernel": lambda: torch.add(source, 1.0, out=target), "engine": lambda: target.copy_(source)}
    fastest = min(result["median_ns"] for result in time_in_turn(copies, calls=2).values())
    found = {"bytes": 2 * source.nbytes / (1e-9 * fastest)}
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    e, f = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    i, j = a.mul(30).to(torch.int8), b.mul(30).to(torch.int8).t()
    one = torch.ones((), device="cuda")
    products = {
        "bf16": lambda: a @ b,
        "fp8": lambda: torch._scaled_mm(e, f, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True),
        "int8": lambda: torch._int_mm(i, j),
    }
    for name, result in time_in_turn(products).items():
        if "median_ns" in result:
            found[name] = 2 * n**3 / (1e-9 * result["median_ns"])
    return found
