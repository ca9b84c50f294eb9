# SPDX-License-Identifier: Apache-2.0
"""What transformers renamed between the versions that tilewright runs beside."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_OLD, _NEW = "past_key_values", "cache"


@functools.cache
def cache_name() -> str:
    """What a model's cache is called in arguments and outputs: "cache" since 5.24, "past_key_values" before."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return _NEW if _NEW in {field.name for field in fields(CausalLMOutputWithPast)} else _OLD


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments under either name, or None."""
    cache = arguments.get(_NEW)
    return arguments.get(_OLD) if cache is None else cache
