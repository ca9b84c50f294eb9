# SPDX-License-Identifier: Apache-2.0
"""A model in ONNX and a property in VNN-LIB: the answer in VNN-COMP's words."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.verify.genbab import from_onnx, vnnlib
from tilewright.verify.genbab.graph import Graph
from tilewright.verify.genbab.verifier import Verification, verify

AGREEMENT = 1e-3
"""How far the graph may be from onnx's float32 evaluation, relative to the largest output plus one."""


@dataclass
class Answer:
    """word: "sat" (an unsafe point exists: ``x`` and the model's ``y`` there), "unsat" (proved safe), "unknown" or
    "timeout". lower_bound: the worst of all boxes."""

    word: str
    x: Tensor | None
    y: Tensor | None
    lower_bound: float
    domains_visited: int
    time: float
    reason: str = ""


def load_onnx(path: str | os.PathLike[str], dtype: torch.dtype = torch.float64) -> tuple[Graph, Any]:
    """The graph of an ONNX file and the parsed model, after comparing the two at three points.

    Raises:
        ValueError: the file is damaged, holds NaN weights, or its graph disagrees with onnx's reference evaluator.
        UnsupportedOperator: an operator has no bounds.
    """
    model = from_onnx.load(path)
    graph = from_onnx.read(model, dtype)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.5, 0.5):
        x = scale * torch.rand(graph.nodes[0].size, generator=generator, dtype=torch.float64)
        wanted, got = from_onnx.evaluate(model, x), graph.forward(x[None].to(dtype))[0].to(torch.float64)
        if not wanted.isfinite().all():
            continue
        error = float((wanted - got).abs().max()) if wanted.shape == got.shape else float("inf")
        if not error <= AGREEMENT * (1 + float(wanted.abs().max())):
            raise ValueError(f"{os.fspath(path)}: the graph read differs from onnx's own evaluation by {error:.3g}")
    return graph, model


def verify_files(
    model_path: str | os.PathLike[str], property_path: str | os.PathLike[str], *, timeout: float = 60.0, **options: Any
) -> Answer:
    """Search for an unsafe point of a VNN-LIB property, box after box.

    options: those of :func:`verify`. A witness counts only if onnx's reference evaluator, in the model's own precision,
    finds it unsafe too.
    """
    started = time.monotonic()
    graph, model = load_onnx(model_path)
    sets = vnnlib.read(property_path)
    n_in, n_out = graph.nodes[0].size, graph.nodes[-1].size
    lower, visited, reason, word = float("inf"), 0, "", "unsat"
    for one in sets:
        if len(one.x_L) != n_in or one.rows[0][0].shape[1] != n_out:
            raise ValueError(
                f"{os.fspath(property_path)} is about {len(one.x_L)} inputs and {one.rows[0][0].shape[1]} outputs, "
                f"the model has {n_in} and {n_out}"
            )
        left = timeout - (time.monotonic() - started)
        found = _one(graph, model, one, max(left, 1e-3), options)
        lower, visited = min(lower, found.lower_bound), visited + found.domains_visited
        if found.status == "falsified":
            assert found.witness is not None
            x = found.witness.reshape(-1)
            y = from_onnx.evaluate(model, x)
            return Answer("sat", x, y, found.lower_bound, visited, time.monotonic() - started)
        if found.status == "unknown":
            word, reason = ("timeout" if found.reason.startswith("timeout") else "unknown"), found.reason
    return Answer(word, None, None, lower, visited, time.monotonic() - started, reason)


def _one(graph: Graph, model: Any, one: vnnlib.UnsafeSet, timeout: float, options: dict[str, Any]) -> Verification:
    c, rhs = one.clauses()

    def confirm(x: Tensor) -> Tensor:
        return from_onnx.evaluate(model, x)

    return verify(graph, one.x_L, one.x_U, c, rhs, timeout=timeout, confirm=confirm, **options)
