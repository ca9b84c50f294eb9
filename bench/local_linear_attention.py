# SPDX-License-Identifier: Apache-2.0
"""Local linear attention beside the solve written out in torch, and beside torch's softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.records import digest
from bench.timing import summary, time_in_turn
from tilewright.ops import lla_attention
from tilewright.reference.local_linear_attention import lla_reference

SOFTMAX = "torch float32"
DENSE_MAX_TOKENS = 1024
"""The dense solve holds T^2 D differences: 256 MB at this length and D = 64."""


def visited(problem: dict[str, Any], passes: float) -> float:
    """Multiplications and additions of so many products over the visible pairs of query and key."""
    tokens = problem["tokens"]
    return 2 * passes * problem["heads"] * problem["head_dim"] * tokens * (tokens + 1) / 2


def works_of(q: Tensor, k: Tensor, v: Tensor, case: dict[str, Any]) -> dict[str, Callable[[int], Any]]:
    """What is timed. The last two are peers."""
    ridge, heads = case["ridge_lambda"], [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    learned = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward_backward(_: int) -> Tensor:
        o: Tensor = lla_attention(*learned, ridge_lambda=ridge, solver="cg")
        torch.autograd.grad(o.sum(), learned)
        return o.detach()

    def fixed(_: int) -> Any:
        return lla_attention(q, k, v, ridge_lambda=ridge, solver="cg", cg_rtol=0.0, cg_max_iters=case["iterations"])

    works: dict[str, Callable[[int], Any]] = {
        "lla_attention": lambda _: lla_attention(q, k, v, ridge_lambda=ridge, solver="cg"),
        f"lla_attention, {case['iterations']} iterations": fixed,
        "lla_attention and its gradients": forward_backward,
    }
    if case["head_dim"] <= 32:
        works["lla_attention, Cholesky"] = lambda _: lla_attention(q, k, v, ridge_lambda=ridge, solver="direct")
    if case["tokens"] <= DENSE_MAX_TOKENS:
        works["dense solve"] = lambda _: lla_reference(q, k, v, ridge_lambda=ridge)[0]
    works[SOFTMAX] = lambda _: scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    return works


def run_case(case: dict[str, Any], threads: int, seconds: float) -> list[dict[str, Any]]:
    """Records of one `[[local_linear_attention]]` case; `torch float32` computes softmax attention, the cheaper thing.

    `operations` of our forms count two products for the weights and their mean, two an iteration, two for the output;
    a backward pass solves again and forms fifteen products more.
    """
    del threads
    problem = {key: case[key] for key in ("tokens", "heads", "head_dim")}
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, case["tokens"], case["heads"], case["head_dim"]) for _ in range(3))
    works = works_of(q, k, v, case)
    found = {name: work(0).detach() for name, work in works.items()}
    ridge = case["ridge_lambda"]
    _, stats = lla_attention(q, k, v, ridge_lambda=ridge, solver="cg", return_stats=True)
    exact = lla_attention(*(x.double() for x in (q, k, v)), ridge_lambda=ridge, solver="cg", cg_rtol=1e-9,
                          cg_max_iters=300)  # fmt: skip
    softmax = scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v)), is_causal=True)
    wanted = {name: softmax.transpose(1, 2) if name == SOFTMAX else exact for name in works}
    mean = float(stats["iters"].double().mean())
    passes = {
        "lla_attention": 4 + 2 * mean,
        f"lla_attention, {case['iterations']} iterations": 4 + 2 * case["iterations"],
        "lla_attention and its gradients": 4 + 4 * mean + 15,
        "lla_attention, Cholesky": 4 + (case["head_dim"] + 1) / 2,
        "dense solve": 4 + case["head_dim"],
        SOFTMAX: 2,
    }
    samples = time_in_turn(works, seconds)
    medians = {name: summary(times)["median_ns"] for name, times in samples.items()}
    return [
        {
            "op": name,
            "problem": problem | {"ridge_lambda": ridge, "mean_iterations": mean},
            "dtype": "float32",
            "kernel": name,
            **summary(times),
            "operations": visited(problem, passes[name]),
            "digest": digest(found[name]),
            "relative_error": float((found[name].double() - wanted[name]).norm() / wanted[name].norm()),
            "ratios": {other: medians[other] / medians[name] for other in samples if other != name},
        }
        for name, times in samples.items()
    ]
