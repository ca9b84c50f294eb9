# SPDX-License-Identifier: Apache-2.0
"""Mixture of memories: several linear-attention states and a router (MoM, arXiv 2502.13685)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilewright.nn.mom.attention import OPS, mom_attention
from tilewright.nn.mom.layer import MomAttention
from tilewright.nn.mom.routing import load_balancing_loss, mom_route

if TYPE_CHECKING:
    from tilewright.nn.mom.configuration import MomConfig
    from tilewright.nn.mom.modeling import MomForCausalLM

MIXERS = {"mom": MomAttention}

__all__ = [
    "MIXERS",
    "OPS",
    "MomAttention",
    "MomConfig",
    "MomForCausalLM",
    "load_balancing_loss",
    "mom_attention",
    "mom_route",
]

# These need transformers, which is optional.
_LAZY = {"MomConfig": "configuration", "MomForCausalLM": "modeling"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
