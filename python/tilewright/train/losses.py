# SPDX-License-Identifier: Apache-2.0
"""Losses and scores of a batch (inputs, labels): functions of (model, batch) that the trainer calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.data.recall import IGNORE

Loss = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, Tensor | int]"]
"""``loss(model, batch)``: a sum and how many terms it has, or one number, which then counts once.

With the sum and the count, the gradient of a step is that of the mean over all terms of all its batches and processes,
however unevenly they are spread.
"""


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's output tensor, also where it comes as an object with ``.logits`` (transformers)."""
    out: Any = model(inputs)
    return getattr(out, "logits", out)


def token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, summed, and the number of scored tokens.

    batch: inputs and labels, int64 [B, T]; ``labels[b, t]`` is what the logits at t must say, ``IGNORE`` is not scored.
    """
    inputs, labels = batch
    logits = logits_of(model, inputs).flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORE)
    return total, (labels != IGNORE).sum()


def regression_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Squared error, summed, and the number of scored entries.

    batch: inputs and labels [..., D]; entries whose label is NaN are not scored. Outputs have the shape of the labels.
    """
    inputs, labels = batch
    out = logits_of(model, inputs)
    if out.shape != labels.shape:
        raise ValueError(f"the model gives {list(out.shape)} for labels {list(labels.shape)}; equal shapes are needed")
    asked = ~labels.isnan()
    return (out[asked] - labels[asked]).square().sum(), asked.sum()


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any], loss: Loss = token_loss) -> float:
    """Mean of a loss over batches, each weighted by what it counts; the model is left in the mode it was in."""
    total, count = 0.0, 0.0
    with evaluating(model):
        for batch in batches:
            part, terms = as_sum(loss(model, to_device(batch, device_of(model))))
            total, count = total + float(part), count + float(terms)
    if count == 0:
        raise ValueError("the batches score nothing: no batch, or every label is ignored")
    return total / count


@torch.no_grad()
def token_accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of scored positions whose likeliest token is the label."""
    right = count = 0
    with evaluating(model):
        for batch in batches:
            inputs, labels = to_device(batch, device_of(model))
            asked = labels != IGNORE
            right += int((logits_of(model, inputs).argmax(-1)[asked] == labels[asked]).sum())
            count += int(asked.sum())
    if count == 0:
        raise ValueError("the batches score nothing: no batch, or every label is ignored")
    return right / count


def as_sum(value: Tensor | tuple[Tensor, Tensor | int]) -> tuple[Tensor, Tensor | int]:
    """What a loss returned as (sum, count)."""
    return value if isinstance(value, tuple) else (value, 1)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of tensors in tuples, lists and dictionaries, moved."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(item, device) for item in batch)
    if isinstance(batch, dict):
        return {name: to_device(item, device) for name, item in batch.items()}
    return batch


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's former mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
