# SPDX-License-Identifier: Apache-2.0
"""Exit codes of `tw`."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What the shell sees."""

    OK = 0
    FAILED = 1
    """A claim does not hold or a check failed; the command itself ran to its end."""
    BAD_INPUT = 2
    """Wrong usage, a file that cannot be read, a value that cannot be right, a full disk."""
    MISSING_DEPENDENCY = 3
    """An optional package is absent; the message names the command that installs it."""
    INTERNAL = 70
    """An error of tilewright itself; `--debug` shows where."""
    INTERRUPTED = 130
