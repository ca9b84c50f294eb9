# SPDX-License-Identifier: Apache-2.0
"""`tw fetch`: the real model and the encyclopedia text, into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from tilewright.cli.shared import Json, print_json, progress_bar

WHAT = ("smollm2", "encyclopedia")


def fetch(
    what: Annotated[list[str] | None, typer.Argument(help="smollm2 (98 MB) or encyclopedia (7 MB).")] = None,
    as_json: Json = False,
) -> None:
    """Fetch the SmolLM2-135M-Instruct model (or the encyclopedia text) into the cache, checked by SHA-256."""
    from tilewright.data import fetch_encyclopedia, smollm2_gguf
    from tilewright.data.text import find_encyclopedia

    wanted = what or ["smollm2"]
    for name in wanted:
        if name not in WHAT:
            raise ValueError(f"{name!r} cannot be fetched; choose from {', '.join(WHAT)}")
    paths = {}
    with progress_bar() as progress:
        for name in wanted:
            if name == "smollm2":
                paths[name] = str(smollm2_gguf(fetch=True, progress=progress))
            else:
                paths[name] = str(find_encyclopedia() or fetch_encyclopedia(progress))
    if as_json:
        print_json(paths)
    else:
        for name, path in paths.items():
            print(f"{name}: {path}")
