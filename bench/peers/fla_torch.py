# SPDX-License-Identifier: Apache-2.0
"""flash-linear-attention's own torch code: the `naive.py` of each operator, which runs without a GPU.

The package imports triton, which a CPU has no use for, so the files are loaded one by one from where it is installed:
this environment, or one that `scripts/peers.sh` made.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tilewright.measure.launch import peer_environments

Inputs = dict[str, Tensor]


@cache
def folder() -> Path | None:
    """`fla/ops` of an installation that has einops beside it, or None."""
    places = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    for python in peer_environments():
        places += sorted(python.parent.parent.glob("lib/python3*/site-packages"))
    for place in places:
        if (place / "fla" / "ops").is_dir() and (importlib.util.find_spec("einops") or (place / "einops").is_dir()):
            if importlib.util.find_spec("einops") is None:
                sys.path.append(str(place))
            return place / "fla" / "ops"
    return None


def why_absent() -> str | None:
    """One line why there is no such peer, or None."""
    return None if folder() else "fla-core not installed; make peers"


@cache
def _module(name: str) -> ModuleType:
    root = folder()
    assert root is not None
    spec = importlib.util.spec_from_file_location(f"fla_torch_{name}", root / name / "naive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _heads_first(function: str, operator: str, *names: str) -> Callable[[Inputs], Tensor]:
    def work(x: Inputs) -> Tensor:
        out, _ = getattr(_module(operator), function)(*(x[name].transpose(1, 2) for name in names))
        return torch.as_tensor(out).transpose(1, 2)

    return work


def _heads_last(function: str, operator: str, *names: str) -> Callable[[Inputs], Tensor]:
    def work(x: Inputs) -> Tensor:
        out: Any = getattr(_module(operator), function)(**{name: x[name] for name in names})
        return torch.as_tensor(out[0] if isinstance(out, tuple) else out)

    return work


FORMS: dict[str, Callable[[Inputs], Tensor]] = {
    "delta": _heads_first("delta_rule_chunkwise", "delta_rule", "q", "k", "v", "beta"),
    "gated_delta": _heads_last("naive_chunk_gated_delta_rule", "gated_delta_rule", "q", "k", "v", "g", "beta"),
    "kda": _heads_last("naive_chunk_kda", "kda", "q", "k", "v", "g", "beta"),
    "simple_gla": _heads_last("naive_chunk_simple_gla", "simple_gla", "q", "k", "v", "g"),
    "linear": _heads_last("naive_chunk_linear_attn", "linear_attn", "q", "k", "v"),
}
"""Chunked forms only: the others of its `naive.py` files go token by token or build the full matrix."""
