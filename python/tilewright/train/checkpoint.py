# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: one file, complete or absent, checked when it is read.

A file holds the trained parameters and the buffers, the optimizer's moments, where the run is, and the settings. Frozen
parameters are not copied; their sums are kept, so that a run does not go on over another base model. Everything is
stored whole and by name, whatever the number of processes, so a run may go on with another number.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilewright._files import atomic_write
from tilewright.train.distributed import fill, whole

FORMAT, VERSION = "tilewright.train", 1


class TrainingCheckpointError(ValueError):
    """A training checkpoint is damaged, or belongs to another model or other settings."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trained parameters and persistent buffers, by name."""
    kept = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in kept}
    return {**trained_parameters(model), **buffers}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Full values of what a run has changed; every process must call this."""
    moments = {
        name: {key: whole(value) for key, value in optimizer.state[p].items()}
        for name, p in trained_parameters(model).items()
        if p in optimizer.state
    }
    return {"model": copies(model), "frozen": _frozen_sums(model), "optimizer": moments}


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Full values of :func:`model_tensors` on the CPU."""
    return {name: whole(tensor) for name, tensor in model_tensors(model).items()}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint beside ``path`` and rename it."""
    with atomic_write(path) as partial:
        torch.save({"format": FORMAT, "version": VERSION, **content}, partial)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content.

    Raises:
        FileNotFoundError: there is none.
        TrainingCheckpointError: it is damaged (its checksums are compared), or no training checkpoint.
    """
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if wrong := archive.testzip():
                raise TrainingCheckpointError(f"{path}: damaged, the checksum of {wrong} differs; use an older copy")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, NotImplementedError) as error:
        raise TrainingCheckpointError(f"{path}: damaged or no checkpoint ({error}); use an older copy") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TrainingCheckpointError(f"{path}: not a training checkpoint of tilewright")
    if content.get("version") != VERSION:
        raise TrainingCheckpointError(
            f"{path}: format version {content.get('version')}; this tilewright reads version {VERSION}"
        )
    return content


def restore(path: Path, content: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into a model and its optimizer; nothing is changed when they do not fit.

    Raises:
        TrainingCheckpointError: names, shapes or frozen weights differ.
    """
    tensors = model_tensors(model)
    _same_names(path, "trained parameters and buffers", content["model"], tensors)
    for name, value in content["model"].items():
        if value.shape != tensors[name].shape:
            raise TrainingCheckpointError(
                f"{path}: {name} has shape {list(value.shape)}, the model's has {list(tensors[name].shape)}"
            )
    frozen = _frozen_sums(model)
    _same_names(path, "frozen parameters", content["frozen"], frozen)
    if other := [name for name, total in frozen.items() if total != content["frozen"][name]]:
        raise TrainingCheckpointError(
            f"{path}: the frozen weights differ from the run's ({other[0]} and {len(other) - 1} more); "
            "load the base model that the run began with"
        )
    for name, value in content["model"].items():
        fill(tensors[name], value)
    for name, parameter in trained_parameters(model).items():
        moments = content["optimizer"].get(name, {})
        optimizer.state[parameter] = {key: _like(value, parameter) for key, value in moments.items()}


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """An optimizer's tensor, sharded as its parameter is when it has the parameter's shape."""
    if value.shape != parameter.shape or value.dim() == 0:
        return value.clone()
    target = torch.empty_like(parameter, requires_grad=False)
    fill(target, value)
    return target


def _frozen_sums(model: nn.Module) -> dict[str, float]:
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: float(whole(p).double().sum()) for name, p in frozen.items()}


def _same_names(path: Path, what: str, stored: Iterable[str], present: Iterable[str]) -> None:
    stored, present = set(stored), set(present)
    if stored != present:
        only = sorted(stored ^ present)
        side = "the checkpoint" if only[0] in stored else "the model"
        raise TrainingCheckpointError(
            f"{path}: other {what} than the model's; only in {side}: {only[0]} ({len(only)} names differ in all)"
        )
