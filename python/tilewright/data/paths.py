# SPDX-License-Identifier: Apache-2.0
"""Where fetched files are kept."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "TILEWRIGHT_CACHE"


def cache_dir() -> Path:
    """Folder of fetched files; not created by asking.

    `TILEWRIGHT_CACHE` when set, else `.cache/` of the source checkout that this package runs from, else
    `$XDG_CACHE_HOME/tilewright` or `~/.cache/tilewright`.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").is_file() and (checkout / "csrc").is_dir():
        return checkout / ".cache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "tilewright"
