# SPDX-License-Identifier: Apache-2.0
"""Recovering quality with few parameters: LoRA on query, key, gate and down projections, thresholds fixed (section
4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright._progress import track
from tilewright.adapt import apply_lora, lora_parameters

TARGETS = ("q_proj", "k_proj", "gate_proj", "down_proj")


@dataclass(frozen=True)
class Tuning:
    """Settings of :func:`finetune`.

    steps: updates of the parameters. accumulation: batches of one update. lr: peak of the learning rate, which rises
    over
    the first tenth of the steps and falls linearly to zero.

    Raises:
        ValueError: a value that cannot be right.
    """

    steps: int = 100
    accumulation: int = 8
    lr: float = 1e-3
    r: int = 8
    alpha: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulation < 1 or self.lr <= 0:
            raise ValueError(f"Tuning: steps = {self.steps}, accumulation = {self.accumulation}, lr = {self.lr}; "
                             "positive numbers are needed")  # fmt: skip


def finetune(
    model: nn.Module, batches: Iterable[Tensor], tuning: Tuning | None = None, *, progress: bool | None = None
) -> list[float]:
    """Train LoRA adapters on a model that has CATS (:func:`apply_cats`), in place; the loss of each step.

    Dropped activations pass no gradient, kept ones that of the activation. Adapters stay on the model;
    :func:`tilewright.adapt.merge_lora` adds them to the weights.

    Args:
        batches: tokens int64 [B, T] for next-token prediction; at least steps * accumulation of them are taken in
        order,
            from the beginning again where there are fewer.

    Raises:
        ValueError: there is no batch, or the model has no layer of a target's name.
    """
    tuning = tuning or Tuning()
    torch.manual_seed(tuning.seed)
    apply_lora(model, TARGETS, tuning.r, tuning.alpha)
    parameters = list(lora_parameters(model))
    optimizer = torch.optim.AdamW(parameters, lr=tuning.lr, weight_decay=0.0)
    source = _forever(batches)
    losses = []
    for step in track(range(tuning.steps), "fine-tuning", show=progress):
        for group in optimizer.param_groups:
            group["lr"] = tuning.lr * _schedule(step, tuning.steps)
        total = 0.0
        for _ in range(tuning.accumulation):
            loss = _loss(model, next(source)) / tuning.accumulation
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses


def _schedule(step: int, steps: int) -> float:
    rise = max(steps // 10, 1)
    return min((step + 1) / rise, (steps - step) / max(steps - rise, 1), 1.0)


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    answer: Any = model(tokens)
    logits = getattr(answer, "logits", answer)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _forever(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    kept = list(batches)
    if not kept:
        raise ValueError("batches is empty; at least one batch of tokens is needed")
    while True:
        yield from kept
