# SPDX-License-Identifier: Apache-2.0
"""The sparse gated MLP beside torch's three dense products, one token, at several shares of dropped neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear, silu

from bench.records import digest
from bench.timing import copies_beyond_cache, summary, time_in_turn
from tilewright import _host
from tilewright.ops import sparse_gated_mlp
from tilewright.ops.sparse_gated_mlp import weight_bytes_read


def run_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:
    """Records of one `[[sparse_gated_mlp]]` case: torch's trio, and the operator at each sparsity."""
    tokens, hidden, inner = (case[name] for name in ("tokens", "hidden", "inner"))
    dtype = getattr(torch, case.get("dtype", "float32"))
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, dtype=dtype)
    sets = _weights(hidden, inner, dtype, rotate=case.get("rotate", True))
    works: dict[str, Callable[[int], torch.Tensor]] = {f"torch {case.get('dtype', 'float32')}": _dense(x, sets)}
    reads: dict[str, int] = {}
    limits = {next(iter(works)): torch.tensor(0.0)}
    for sparsity in case["sparsities"]:
        name = f"sparse_gated_mlp {round(100 * sparsity)} %"
        gates = silu(linear(x.float(), sets[0][0].float())).abs().flatten()
        threshold = gates.kthvalue(max(round(sparsity * gates.numel()), 1)).values
        works[name], limits[name] = _sparse(x, sets, threshold), threshold
        kept = sparse_gated_mlp(x, sets[0][0], sets[0][1], sets[0][2], threshold, return_kept=True)[1]
        reads[name] = weight_bytes_read(kept, hidden, dtype)
    results = {name: work(0) for name, work in works.items()}
    errors = {name: _error(results[name], x, sets[0], limit) for name, limit in limits.items()}
    samples = time_in_turn(works, seconds)
    bandwidth = _host.read_bandwidth(sets[0][0].view(torch.uint8).numpy(), threads)
    medians = {name: summary(times)["median_ns"] for name, times in samples.items()}
    dense_bytes = 3 * hidden * inner * dtype.itemsize
    records = []
    for name, times in samples.items():
        size = reads.get(name, dense_bytes)
        records.append(
            {
                "op": name,
                "problem": {"tokens": tokens, "hidden": hidden, "inner": inner},
                "dtype": str(dtype).removeprefix("torch."),
                "kernel": "sparse_gated_mlp" if name in reads else "at::linear",
                **summary(times),
                "bytes": size,
                "share_of_dense_bytes": size / dense_bytes,
                "bandwidth_bytes_per_s": bandwidth,
                "operations": 2 * tokens * size // dtype.itemsize,
                "digest": digest(results[name]),
                "relative_error": errors[name],
                "ratios": {other: medians[other] / medians[name] for other in samples if other != name},
            }
        )
    return records


Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _weights(hidden: int, inner: int, dtype: torch.dtype, rotate: bool) -> list[Weights]:
    """Copies of gate, up, down transposed and down; so many that none is cached at its next use, if they rotate."""
    count = copies_beyond_cache(3 * hidden * inner * dtype.itemsize) if rotate else 1
    gate, up, down_t = ((torch.randn(inner, hidden) / hidden**0.5).to(dtype) for _ in range(3))
    down = down_t.T.contiguous()
    return [(gate.clone(), up.clone(), down_t.clone(), down.clone()) for _ in range(count)]


def _error(y: torch.Tensor, x: torch.Tensor, weights: Weights, threshold: torch.Tensor) -> float:
    """Largest error against dense products with a mask in float64, over the largest result."""
    a = silu(x.double() @ weights[0].double().T)
    h = torch.where(a.abs() < threshold.double(), 0.0, a) * (x.double() @ weights[1].double().T)
    exact = h @ weights[2].double()
    return float((y.double() - exact).abs().max() / exact.abs().max())


def _dense(x: torch.Tensor, sets: list[Weights]) -> Callable[[int], torch.Tensor]:
    def work(i: int) -> torch.Tensor:
        gate, up, _, down = sets[i % len(sets)]
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    return work


def _sparse(x: torch.Tensor, sets: list[Weights], threshold: torch.Tensor) -> Callable[[int], torch.Tensor]:
    def work(i: int) -> torch.Tensor:
        gate, up, down_t, _ = sets[i % len(sets)]
        y = sparse_gated_mlp(x, gate, up, down_t, threshold)
        assert isinstance(y, torch.Tensor)
        return y

    return work
