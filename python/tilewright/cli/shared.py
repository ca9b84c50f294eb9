# SPDX-License-Identifier: Apache-2.0
"""What every verb shares: output, progress bars, errors as one line, common options."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tilewright.cli.codes import ExitCode
from tilewright.data.fetch import silent

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from tilewright.data.fetch import Progress

DEBUG_VARIABLE = "TILEWRIGHT_DEBUG"
SMOLLM2_ALIAS, TERNARY_ALIAS = "smollm2", "ternary"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="GGUF file, transformers or tilewright folder, safetensors file; or `smollm2`, `ternary`."
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores when not given.")]
Activations = Annotated[
    str | None, typer.Option("--act", help="Activations: int8, fp8 or fp8-fold; the checkpoint's if not given.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, or cuda for an NVIDIA Hopper GPU.")]
Steer = Annotated[
    str | None, typer.Option("--steer", metavar="FILE", help="Activation maps written by `tw steer fit`.")
]
Strength = Annotated[
    float, typer.Option("--strength", help="How much of --steer: 0 nothing, 1 all of it, negative the other way.")
]
Cache = Annotated[str | None, typer.Option("--kv", help="KV cache: int4 or bf16; the checkpoint's if not given.")]


class Verbs(TyperGroup):
    """A command group that prints an expected error as one line and gives its documented exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; with `--debug` every error keeps its traceback."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError, EOFError):
            raise
        except Exception as error:
            if _is_usage_error(error) or debugging():
                raise
            code, text = explain(error)
            print(f"tw: {text}", file=sys.stderr)
            raise typer.Exit(code) from error


def _is_usage_error(error: Exception) -> bool:
    """Whether typer itself prints this error (unknown option, missing argument, bad choice)."""
    return hasattr(error, "exit_code") and hasattr(error, "format_message")


def debugging() -> bool:
    """Whether tracebacks were asked for."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def explain(error: Exception) -> tuple[ExitCode, str]:
    """Exit code and one line for an error that reached the command line."""
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or str(error)).partition(".")[0]
        return ExitCode.MISSING_DEPENDENCY, f"this needs {name}; install it with: pip install 'tilewright[all]'"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return ExitCode.BAD_INPUT, f"{error.filename}: {error.strerror}"
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (ValueError, OSError, RuntimeError, MemoryError)):
        return ExitCode.BAD_INPUT, message
    where = f"run with --debug (or {DEBUG_VARIABLE}=1) to see where"
    return ExitCode.INTERNAL, f"internal error, {type(error).__name__}: {message}; {where}"


def console(stderr: bool = False) -> Console:
    """A rich console: colours and widths only where a terminal listens."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield a progress callback (what, done, total or None): bars on standard error, nothing without a terminal."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def model_path(name: str) -> Path:
    """The path that MODEL names; `smollm2` is the fetched SmolLM2 file, `ternary` the model in the package.

    Raises `FileNotFoundError` when there is nothing of that name.
    """
    from pathlib import Path

    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.lower() == SMOLLM2_ALIAS:
        from tilewright.data import smollm2_gguf

        return smollm2_gguf()
    if name.lower() == TERNARY_ALIAS:
        from tilewright.data import ternary_model

        return ternary_model()
    raise FileNotFoundError(
        f"{name}: no such file or folder; name a GGUF file, a model folder, `{TERNARY_ALIAS}`, or `{SMOLLM2_ALIAS}` "
        "after `tw fetch`"
    )


def valid_text(text: str, what: str) -> str:
    """`text` itself; `ValueError` naming the place when bytes of it were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid UTF-8 (character {error.start}); pass UTF-8 text") from error
    return text


def read_text(path: Path, what: str) -> str:
    """A file's text; `ValueError` naming the byte when it is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not valid UTF-8 (byte {error.start}); convert it to UTF-8") from error


def use_threads(count: int | None) -> int:
    """Set torch's thread count when one is given; returns the count in force."""
    import torch

    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()
