# SPDX-License-Identifier: Apache-2.0
"""Linear operators beside torch's, against the measured bandwidth and peak of the machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.peers import torch_eager
from bench.records import digest
from bench.timing import copies_beyond_cache, summary, time_in_turn
from tilewright import _host
from tilewright.formats.int4 import Int4Weight, PackedInt4, quantize_int4
from tilewright.ops import int4_fp8_linear, int4_int8_linear

OURS = {"int4_int8_linear": (int4_int8_linear, "int8"), "int4_fp8_linear": (int4_fp8_linear, "bf16")}
CHECKED_ROWS = 4


def relative_error(y: torch.Tensor, x: torch.Tensor, weight: Int4Weight) -> float:
    """Largest error against the float64 product of x and the dequantized weight, over the largest result."""
    some = x[:CHECKED_ROWS].double()
    exact = some @ weight.dequantize(torch.float64).T
    return float((y[:CHECKED_ROWS].double() - exact).abs().max() / exact.abs().max())


def rotated(weight: Int4Weight) -> tuple[torch.Tensor, list[PackedInt4]]:
    """An arena [copies, bytes] larger than the caches, and a packed weight on each of its rows."""
    packed = weight.pack()
    arena = packed.data.repeat(copies_beyond_cache(packed.nbytes), 1)
    return arena, [PackedInt4(row, packed.shape) for row in arena]


def run_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:
    """Records of one `[[linear]]` case: both operators and every available torch form of the same product."""
    m, n, k, group = (case[name] for name in ("m", "n", "k", "group"))
    torch.manual_seed(0)
    weight = quantize_int4(torch.randn(n, k) / k**0.5, group)
    x = torch.randn(m, k)
    arena, weights = rotated(weight)
    works: dict[str, Callable[[int], torch.Tensor]] = {
        name: partial(lambda operator, i: operator(x, weights[i % len(weights)]), operator)
        for name, (operator, _) in OURS.items()
    }
    works |= torch_eager.linears(x, weight.dequantize())
    results = {name: work(0) for name, work in works.items()}
    samples = time_in_turn(works, seconds)
    bandwidth = _host.read_bandwidth(arena.numpy(), threads)
    plan = _host.int4_linear_plan(m, n, k, group)["text"]
    medians = {name: summary(times)["median_ns"] for name, times in samples.items()}
    records = []
    for name, times in samples.items():
        record = {
            "op": name,
            "problem": {"m": m, "n": n, "k": k, "group": group},
            "dtype": torch_eager.FORMS.get(name, "int4"),
            "kernel": plan if name in OURS else "at::linear",
            **summary(times),
            "operations": 2 * m * n * k,
            "digest": digest(results[name]),
            "relative_error": relative_error(results[name], x, weight),
            "ratios": {other: medians[other] / medians[name] for other in samples if other != name},
        }
        if name in OURS:
            peak = _host.peak_operations(OURS[name][1], threads)
            size = weights[0].nbytes
            floor = max(size / bandwidth, record["operations"] / peak)
            record |= {
                "bytes": size,
                "bandwidth_bytes_per_s": bandwidth,
                "peak_operations_per_s": peak,
                "roofline": 1e9 * floor / record["median_ns"],
            }
            record["ratios"]["bandwidth"] = 1e9 * size / record["median_ns"] / bandwidth
            record["ratios"]["peak"] = 1e9 * record["operations"] / record["median_ns"] / peak
        records.append(record)
    return records
