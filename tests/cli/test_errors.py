# SPDX-License-Identifier: Apache-2.0
"""Every expected error is one line on standard error and the documented exit code; nothing shows a traceback."""

from __future__ import annotations

import errno

import pytest
import typer
from typer.testing import CliRunner

from tilewright.cli.codes import ExitCode
from tilewright.cli.shared import DEBUG_VARIABLE, Verbs
from tilewright.models.errors import CheckpointError

ERRORS = {
    "value": (ValueError("n=3: need 4"), ExitCode.BAD_INPUT, "n=3: need 4"),
    "checkpoint": (CheckpointError("a.gguf: magic is wrong"), ExitCode.BAD_INPUT, "magic is wrong"),
    "absent": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "m.gguf"),
        ExitCode.BAD_INPUT,
        "m.gguf: No",
    ),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "out"), ExitCode.BAD_INPUT, "out: No space left"),
    "operator": (RuntimeError("int4_linear: K=3\nmust be even"), ExitCode.BAD_INPUT, "K=3 must be even"),
    "memory": (MemoryError(), ExitCode.BAD_INPUT, "MemoryError"),
    "package": (ModuleNotFoundError("x", name="gguf.reader"), ExitCode.MISSING_DEPENDENCY, "needs gguf"),
    "internal": (KeyError("weight"), ExitCode.INTERNAL, "KeyError"),
}


def failing(error: BaseException) -> typer.Typer:
    """A command group whose verb raises."""
    app = typer.Typer(cls=Verbs, pretty_exceptions_enable=False)

    @app.callback()
    def options() -> None:
        """Nothing."""

    @app.command()
    def verb() -> None:
        raise error

    return app


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_with_its_exit_code(name, monkeypatch):
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)
    error, code, part = ERRORS[name]
    result = CliRunner().invoke(failing(error), ["verb"])
    assert result.exit_code == code
    assert part in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_debug_keeps_the_exception(monkeypatch):
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    error = ValueError("n=3")
    result = CliRunner().invoke(failing(error), ["verb"])
    assert result.exception is error


def test_an_interrupt_gives_130():
    assert CliRunner().invoke(failing(KeyboardInterrupt()), ["verb"]).exit_code == ExitCode.INTERRUPTED


def test_exit_codes_are_the_documented_numbers():
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "BAD_INPUT": 2,
        "MISSING_DEPENDENCY": 3,
        "INTERNAL": 70,
        "INTERRUPTED": 130,
    }
