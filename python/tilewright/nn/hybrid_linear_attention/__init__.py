# SPDX-License-Identifier: Apache-2.0
"""Hybrid linear attention: language models that mix linear-time layers with softmax layers (arXiv 2507.06457)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilewright.nn.hybrid_linear_attention.build import build_hybrid, hybrid_config
from tilewright.nn.hybrid_linear_attention.cost import flops_per_token, pareto, state_bytes
from tilewright.nn.hybrid_linear_attention.layout import attention_layers

if TYPE_CHECKING:
    from tilewright.nn.hybrid_linear_attention.configuration import HybridConfig
    from tilewright.nn.hybrid_linear_attention.modeling import HybridForCausalLM, HybridModel

__all__ = [
    "HybridConfig",
    "HybridForCausalLM",
    "HybridModel",
    "attention_layers",
    "build_hybrid",
    "flops_per_token",
    "hybrid_config",
    "pareto",
    "state_bytes",
]

# These need transformers, which is optional.
_LAZY = {"HybridConfig": "configuration", "HybridForCausalLM": "modeling", "HybridModel": "modeling"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
