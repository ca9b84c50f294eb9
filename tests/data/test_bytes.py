# SPDX-License-Identifier: Apache-2.0
"""Byte windows are what follows in the text, and documentation is split without a shared passage."""

from __future__ import annotations

import pytest
import torch

from tilewright.data import bytes as byte_data
from tilewright.data import corpus
from tilewright.data.bytes import ByteWindows, byte_text, documentation, held_out_windows, to_bytes


def test_bytes_are_the_texts_utf8():
    text = byte_text("speeches", "evaluation", max_bytes=1000)
    assert text.dtype == torch.uint8
    assert bytes(text.tolist()) == corpus("speeches", "evaluation").encode()[:1000]
    assert to_bytes("é").tolist() == [0xC3, 0xA9]


def test_windows_of_a_step_are_text_and_what_follows():
    text = to_bytes(bytes(range(256)))
    windows = ByteWindows(text, batch=8, length=10, seed=3)
    inputs, labels = windows(5)
    assert inputs.shape == labels.shape == (8, 10)
    assert torch.equal(inputs + 1, labels)  # the text counts upwards
    assert torch.equal(windows(5)[0], inputs)
    assert not torch.equal(windows(6)[0], inputs)
    assert not torch.equal(ByteWindows(text, batch=8, length=10, seed=4)(5)[0], inputs)


def test_windows_reach_both_ends_of_the_text():
    starts = torch.cat([ByteWindows(to_bytes(bytes(range(20))), 64, 16)(step)[0][:, 0] for step in range(4)])
    assert set(starts.tolist()) == {0, 1, 2, 3}


def test_held_out_windows_cover_the_text_once():
    text = to_bytes(bytes(range(50)))
    batches = held_out_windows(text, length=7, batch=3)
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 1]
    assert torch.cat([inputs for inputs, _ in batches]).flatten().tolist() == list(range(49))
    assert torch.cat([labels for _, labels in batches]).flatten().tolist() == list(range(1, 50))


def test_a_text_too_short_is_named():
    with pytest.raises(ValueError, match="N > length=10"):
        ByteWindows(to_bytes(bytes(10)), 1, 10)
    with pytest.raises(ValueError, match="10 tokens hold 0 windows of 10"):
        held_out_windows(to_bytes(bytes(10)), length=10, batch=1)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package of 40 documented files; two of them repeat the text of another."""
    root = tmp_path / "documented_package"
    root.mkdir()
    (root / "__init__.py").write_text("")
    for i in range(40):
        text = f"Text {i % 38}. " + f"words of file {i % 38} " * 12
        (root / f"file{i}.py").write_text(f'def f():\n    """{text}"""\n\ndef g():\n    """short"""\n')
    (root / "broken.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)
    return "documented_package"


def test_documentation_is_split_by_file_and_holds_each_text_once(package):
    parts = [documentation(part, packages=(package,)).rstrip("\n").split("\n\n") for part in byte_data.PARTS]
    assert sorted(text.split(".")[0] for part in parts for text in part) == sorted(f"Text {i}" for i in range(38))
    assert all(parts)
    assert not any("short" in text for part in parts for text in part)


def test_documentation_stops_where_asked(package):
    both = sum(len(documentation(part, packages=(package,), max_characters=1000)) for part in byte_data.PARTS)
    assert 1000 <= both < 1600


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="speeches, moby-dick, encyclopedia, documentation"):
        byte_text("novel", "evaluation")
    with pytest.raises(ValueError, match="calibration, evaluation"):
        documentation("test")
    with pytest.raises(FileNotFoundError, match="no_such_package"):
        documentation("evaluation", packages=("no_such_package",))
