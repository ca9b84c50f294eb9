# SPDX-License-Identifier: Apache-2.0
"""Tools for testing numerical code, ours and that of users: levels, poison, derived bounds."""

from __future__ import annotations

from tilewright.testing.bounds import UNIT_ROUNDOFF, assert_within
from tilewright.testing.emulator import Emulator, emulated, emulated_operators, emulator_missing
from tilewright.testing.levels import isa_level, isa_levels
from tilewright.testing.poison import poisoned_allocations

__all__ = [
    "UNIT_ROUNDOFF",
    "Emulator",
    "assert_within",
    "emulated",
    "emulated_operators",
    "emulator_missing",
    "isa_level",
    "isa_levels",
    "poisoned_allocations",
]
