# SPDX-License-Identifier: Apache-2.0
"""Uninitialised memory that shows: an element that a kernel forgets to write is NaN, not a lucky zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside the block torch fills every `empty` tensor with NaN (floats) or the largest value (integers)."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill
