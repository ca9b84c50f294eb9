# SPDX-License-Identifier: Apache-2.0
"""GenBaB: branch-and-bound verification of networks with general nonlinearities (arXiv 2405.21063)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.verify.genbab.bounded_module import (
        BoundedModule,
        BoundedTensor,
        PerturbationLpNorm,
        UnboundedError,
    )
    from tilewright.verify.genbab.build import UnsupportedOperator
    from tilewright.verify.genbab.files import Answer, load_onnx, verify_files
    from tilewright.verify.genbab.functions import register_relaxation
    from tilewright.verify.genbab.inverse import unary_relaxation
    from tilewright.verify.genbab.verifier import Verification, minimum, verify

_HOME = {
    "Answer": "files",
    "BoundedModule": "bounded_module",
    "BoundedTensor": "bounded_module",
    "PerturbationLpNorm": "bounded_module",
    "UnboundedError": "bounded_module",
    "UnsupportedOperator": "build",
    "Verification": "verifier",
    "load_onnx": "files",
    "minimum": "verifier",
    "register_relaxation": "functions",
    "unary_relaxation": "inverse",
    "verify": "verifier",
    "verify_files": "files",
}

__all__ = [
    "Answer",
    "BoundedModule",
    "BoundedTensor",
    "PerturbationLpNorm",
    "UnboundedError",
    "UnsupportedOperator",
    "Verification",
    "load_onnx",
    "minimum",
    "register_relaxation",
    "unary_relaxation",
    "verify",
    "verify_files",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
