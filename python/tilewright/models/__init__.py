# SPDX-License-Identifier: Apache-2.0
"""Loading, saving and running language models of the Llama family.

``load(path)`` reads GGUF files, transformers directories (float or 4-bit) and tilewright checkpoints;
``save(model, directory)`` writes the latter; ``to_transformers(model)`` gives a transformers model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilewright.models.config import LlamaConfig
from tilewright.models.errors import CheckpointError
from tilewright.models.rope import RopeScaling

if TYPE_CHECKING:
    from tilewright.models.checkpoint import save
    from tilewright.models.generation import EngineForCausalLM
    from tilewright.models.hf import to_transformers
    from tilewright.models.int4_cache import Int4KVCache
    from tilewright.models.language_model import LanguageModel, linear_names
    from tilewright.models.loading import load

__all__ = [
    "CheckpointError",
    "EngineForCausalLM",
    "Int4KVCache",
    "LanguageModel",
    "LlamaConfig",
    "RopeScaling",
    "linear_names",
    "load",
    "save",
    "to_transformers",
]

_LAZY = {
    "EngineForCausalLM": "generation",
    "Int4KVCache": "int4_cache",
    "LanguageModel": "language_model",
    "linear_names": "language_model",
    "load": "loading",
    "save": "checkpoint",
    "to_transformers": "hf",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
