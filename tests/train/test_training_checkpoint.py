# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is damaged or of another model is refused by name, and changes nothing."""

from __future__ import annotations

import zipfile

import pytest
import torch
from trainees import TinyModel

from tilewright.train import checkpoint
from tilewright.train.checkpoint import TrainingCheckpointError


def optimizer_of(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def saved(tmp_path):
    model = TinyModel()
    model.embedding.requires_grad_(False)
    path = tmp_path / "checkpoint.pt"
    checkpoint.write(path, checkpoint.snapshot(model, optimizer_of(model)))
    return path


def restore_into(path, model):
    content = checkpoint.read(path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingCheckpointError) as caught:
        checkpoint.restore(path, content, model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not optimizer.state
    return str(caught.value)


def test_frozen_parameters_are_not_copied(saved):
    assert "embedding.weight" not in checkpoint.read(saved)["model"]


def test_every_damaged_byte_of_a_tensor_is_noticed(saved):
    data = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        members = [info for info in archive.infolist() if info.file_size >= 16]
    assert len(members) > 10
    for info in members:
        # The data follow the local header: 30 bytes, the name, and a field whose length the header states.
        start = info.header_offset
        extra = int.from_bytes(data[start + 28 : start + 30], "little")
        place = start + 30 + len(info.filename) + extra + info.file_size // 2
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        saved.write_bytes(damaged)
        with pytest.raises(TrainingCheckpointError, match=r"checkpoint\.pt: damaged"):
            checkpoint.read(saved)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_damaged(saved, kept):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(TrainingCheckpointError, match="damaged"):
        checkpoint.read(saved)


def test_other_files_are_not_checkpoints(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(TrainingCheckpointError, match="not a training checkpoint"):
        checkpoint.read(path)
    torch.save({"format": checkpoint.FORMAT, "version": 99}, path)
    with pytest.raises(TrainingCheckpointError, match="version 99"):
        checkpoint.read(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "absent.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (pytest.fail, ("code of a checkpoint ran",))

    path = tmp_path / "harmful.pt"
    torch.save({"format": checkpoint.FORMAT, "model": Harmful()}, path)
    with pytest.raises(TrainingCheckpointError, match="damaged or no checkpoint"):
        checkpoint.read(path)


def test_another_model_is_refused(saved):
    deeper, wider, thawed, other = TinyModel(depth=3), TinyModel(width=12), TinyModel(), TinyModel(seed=1)
    for model in (deeper, wider, other):
        model.embedding.requires_grad_(False)
    assert "only in the model: blocks.2.0.bias" in restore_into(saved, deeper)
    assert "has shape" in restore_into(saved, wider)
    assert "only in the model: embedding.weight" in restore_into(saved, thawed)
    assert "frozen weights differ" in restore_into(saved, other)
