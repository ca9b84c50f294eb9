# SPDX-License-Identifier: Apache-2.0
"""The command `tw`: one file per verb. Exit codes are in `tilewright.cli.codes`."""

from __future__ import annotations

import sys

from tilewright.cli.codes import ExitCode


def main() -> None:
    """Entry point of `tw`; says what to install when the command line's own dependencies are absent."""
    try:
        from tilewright.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"tw: the command line needs {error.name}; install it with: pip install 'tilewright[cli]'", file=sys.stderr
        )
        sys.exit(ExitCode.MISSING_DEPENDENCY)
    app()


__all__ = ["ExitCode", "main"]
