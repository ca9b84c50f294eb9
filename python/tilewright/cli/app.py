# SPDX-License-Identifier: Apache-2.0
"""The verbs put together: those of the house, and those that a method brings in its own folder."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

import tilewright
from tilewright._methods import modules
from tilewright.cli import (
    bench,
    chat,
    demo,
    doctor,
    evaluate,
    fetch,
    generate,
    linearize,
    quantize,
    reproduce,
    sparsify,
    study,
    train,
)
from tilewright.cli.shared import DEBUG_VARIABLE, Verbs

EPILOG = "Exit codes: 0 done, 1 claim or check failed, 2 bad input, 3 package missing, 70 internal, 130 interrupted."

app = typer.Typer(
    name="tw", cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, epilog=EPILOG
)

VERBS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "fetch": fetch.fetch,
    "quantize": quantize.quantize,
    "sparsify": sparsify.sparsify,
    "linearize": linearize.linearize,
    "train": train.train,
    "generate": generate.generate,
    "chat": chat.chat,
    "eval": evaluate.evaluate,
    "bench": bench.bench,
    "reproduce": reproduce.reproduce,
    "study": study.study,
    "doctor": doctor.doctor,
}


def print_version(asked: bool) -> None:
    """Print the installed version and stop."""
    if asked:
        from importlib.metadata import version

        print(version("tilewright"))
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Neural networks in few bits: load, quantize, run and check real models."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def method_verbs() -> dict[str, Callable[..., None] | typer.Typer]:
    """``VERBS`` of every ``<family>/<method>/cli.py``: a function, or an application with verbs of its own."""
    return {name: verb for module in modules("cli") for name, verb in _alone(module).VERBS.items()}


def _alone(name: str) -> ModuleType:
    """A module without the packages around it, which would bring torch for every `tw --help`."""
    if name not in sys.modules:
        inside = Path(*name.split(".")[1:]).with_suffix(".py")
        path = next(found for root in tilewright.__path__ if (found := Path(root) / inside).is_file())
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


for name, verb in {**VERBS, **method_verbs()}.items():
    if isinstance(verb, typer.Typer):
        app.add_typer(verb, name=name)
    else:
        app.command(name)(verb)
