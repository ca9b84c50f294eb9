# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _poison_every_operator_test(poisoned: None) -> None:
    """An output element that a kernel leaves unwritten is NaN."""
