# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: complete or not at all, whatever happens in between."""

from __future__ import annotations

import pytest

from tilewright import _files
from tilewright._files import atomic_directory, atomic_write


def names(directory) -> list[str]:
    return sorted(p.name for p in directory.rglob("*"))


def interrupted_write(target, error) -> None:
    with atomic_write(target) as partial:
        partial.write_text("half")
        raise error


def interrupted_directory(target, error) -> None:
    with atomic_directory(target) as partial:
        (partial / "new").write_text("half")
        if error is not None:
            raise error


def test_file_appears_with_its_parents_and_replaces_an_old_one(tmp_path):
    target = tmp_path / "a" / "b.txt"
    for text in ("one", "two"):
        with atomic_write(target) as partial:
            partial.write_text(text)
            assert not target.exists() or target.read_text() == "one"
        assert target.read_text() == text
    assert names(tmp_path) == ["a", "b.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [True, False])
def test_file_is_as_before_after_an_error(tmp_path, error, existing):
    target = tmp_path / "b.txt"
    if existing:
        target.write_text("old")
    with pytest.raises(error):
        interrupted_write(target, error)
    assert names(tmp_path) == (["b.txt"] if existing else [])
    assert not existing or target.read_text() == "old"


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "b.txt"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_directory_replaces_an_old_one_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(_files, "_exchange", lambda *_: False)
    target = tmp_path / "d"
    for name in ("one", "two"):
        with atomic_directory(target) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / name).write_text(name)
        assert names(tmp_path) == sorted(["d", "sub", name])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_directory_is_as_before_after_an_error(tmp_path, error, existing):
    target = tmp_path / "d"
    if existing:
        target.mkdir()
        (target / "old").write_text("old")
    with pytest.raises(error):
        interrupted_directory(target, error)
    assert names(tmp_path) == (["d", "old"] if existing else [])


def test_old_directory_is_restored_when_the_move_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_exchange", lambda *_: False)
    target = tmp_path / "d"
    target.mkdir()
    (target / "old").write_text("old")
    original, calls = _files.Path.rename, []

    def failing(self, other):
        calls.append(self.name)
        if len(calls) == 3:
            raise OSError("the second move fails")
        return original(self, other)

    monkeypatch.setattr(_files.Path, "rename", failing)
    with pytest.raises(OSError, match="second move"):
        interrupted_directory(target, None)
    assert names(tmp_path) == ["d", "old"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with atomic_write(tmp_path / "link.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "real.txt").read_text() == "new"
    assert (tmp_path / "link.txt").is_symlink()
