# SPDX-License-Identifier: Apache-2.0
"""Ternary weights times float activations, beside torch and the ternary types of llama.cpp and ik_llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.peers import ggml_matmul, torch_eager
from bench.records import digest
from bench.timing import copies_beyond_cache, summary, time_in_turn
from tilewright import _host
from tilewright.formats.ternary import HEADER_BYTES, PackedTernary, pack_ternary
from tilewright.ops import ternary_linear

PACKINGS = ("q2", "t3w")
OURS = "ternary_linear"
CHECKED_ROWS = 4


def _copies(packed: PackedTernary, count: int) -> list[PackedTernary]:
    return [PackedTernary(packed.data.clone(), packed.shape, packed.format, packed.scale) for _ in range(count)]


def run_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:
    """Records of one `[[ternary_linear]]` case. With `rotate = false` one weight stays in the cache."""
    m, n, k = (case[name] for name in ("m", "n", "k"))
    torch.manual_seed(0)
    weight = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    x = torch.randn(m, k)
    rotate = case.get("rotate", True)
    packed = {name: pack_ternary(weight, name) for name in PACKINGS} | {"auto": pack_ternary(weight, tokens=m)}
    count = copies_beyond_cache(n * k // 4) if rotate else 1
    works: dict[str, Callable[[int], Any]] = {}
    for name, one in packed.items():
        copies = _copies(one, count)
        works[f"{OURS} {name}"] = partial(lambda copies, i: ternary_linear(x, copies[i % len(copies)]), copies)
    results = {name: work(0) for name, work in works.items()}
    sizes = {f"{OURS} {name}": one.nbytes - HEADER_BYTES for name, one in packed.items()}
    if rotate:
        works |= torch_eager.linears(x, weight.float())
        results |= {name: works[name](0) for name in torch_eager.FORMS}
    else:
        wide = weight.float()
        works["torch float32"] = lambda _: torch.nn.functional.linear(x, wide)
        results["torch float32"] = works["torch float32"](0)
    peers = ggml_matmul.products(x, weight, count, threads)
    results |= {name: peer.result for name, peer in peers.items()}
    sizes |= {name: peer.weight_bytes for name, peer in peers.items()}
    with torch.inference_mode():
        samples = time_in_turn(works | dict(peers), seconds)
    for peer in peers.values():
        peer.close()
    return _records(case, threads, samples, results, sizes, packed["auto"], x, weight)


def _error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Largest error against the float64 product, over its largest: what rounding the activations costs."""
    exact = x[:CHECKED_ROWS].double() @ weight.double().T
    return float((y[:CHECKED_ROWS].double() - exact).abs().max() / exact.abs().max())


def _records(
    case: dict[str, Any],
    threads: int,
    samples: dict[str, list[int]],
    results: dict[str, torch.Tensor],
    sizes: dict[str, int],
    auto: PackedTernary,
    x: torch.Tensor,
    weight: torch.Tensor,
) -> list[dict[str, Any]]:
    arena = auto.data.repeat(copies_beyond_cache(auto.data.numel()))
    bandwidth = _host.read_bandwidth(arena.numpy(), threads)
    peak = _host.peak_operations("int8", threads)
    medians = {name: summary(times)["median_ns"] for name, times in samples.items()}
    records = []
    for name, times in samples.items():
        record = {
            "op": name,
            "problem": {key: case[key] for key in ("m", "n", "k")} | {"rotate": case.get("rotate", True)},
            "dtype": torch_eager.FORMS.get(name, "ternary"),
            "kernel": f"{OURS} {auto.format}" if name == f"{OURS} auto" else name,
            **summary(times),
            "operations": 2 * x.shape[0] * weight.numel(),
            "digest": digest(results[name]),
            "relative_error": _error(results[name], x, weight),
            "ratios": {other: medians[other] / medians[name] for other in samples if other != name},
        }
        if name in sizes:
            floor = max(sizes[name] / bandwidth, record["operations"] / peak)
            record |= {
                "bytes": sizes[name],
                "bits_per_weight": 8 * sizes[name] / weight.numel(),
                "bandwidth_bytes_per_s": bandwidth,
                "peak_operations_per_s": peak,
                "roofline": 1e9 * floor / record["median_ns"],
            }
            record["ratios"]["bandwidth"] = 1e9 * sizes[name] / record["median_ns"] / bandwidth
            record["ratios"]["peak"] = 1e9 * record["operations"] / record["median_ns"] / peak
        records.append(record)
    return records
