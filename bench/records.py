# SPDX-License-Identifier: Apache-2.0
"""One JSON record a result, with all that is needed to judge it."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tilewright import doctor

ROOT = Path(__file__).resolve().parent.parent
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def digest(tensor: torch.Tensor) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a result's bytes: equal results, equal digests."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@cache
def commit() -> str:
    """The checkout's commit, with `-dirty` when files differ from it; "unknown" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def environment(threads: int) -> dict[str, Any]:
    """Where a record was made."""
    return {
        "device": "cpu",
        "machine": doctor.machine(),
        "threads": threads,
        "compiler": doctor.build().get("compiler"),
        "clock_policy": GOVERNOR.read_text().strip() if GOVERNOR.is_file() else "not readable",
        "commit": commit(),
    }


def machine_slug(machine: dict[str, Any]) -> str:
    """A file name for a machine's results."""
    words = "".join(c if c.isalnum() else " " for c in machine["processor"].lower()).split()
    return "-".join([*words, f"{machine['cores']}cores"])
