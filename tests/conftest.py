# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: seeds, poisoned memory, the real model where it is present."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tilewright.testing import isa_level, isa_levels, poisoned_allocations


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20260)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty returns NaN during the test."""
    with poisoned_allocations():
        yield


@pytest.fixture(params=isa_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set level of this machine in turn."""
    with isa_level(request.param):
        yield request.param


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real checkpoint; `make demo` or `tw fetch` brings it."""
    from tilewright.data import smollm2_gguf as locate

    try:
        return locate()
    except (FileNotFoundError, OSError) as error:
        pytest.skip(f"the SmolLM2 checkpoint is not here: {error}")
