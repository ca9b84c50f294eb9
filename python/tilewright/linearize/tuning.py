# SPDX-License-Identifier: Apache-2.0
"""Tuning a converted model by adapters: the stage that all methods end with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from tilewright._progress import track
from tilewright.adapt import apply_lora, lora_parameters, merge_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batches = Callable[[int], "tuple[Tensor, Tensor]"]
"""The batch of a number 0, 1, 2, ...: inputs and labels int64 [B, T] (:class:`tilewright.data.bytes.ByteWindows`)."""


def next_token_loss(model: PreTrainedModel, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Cross-entropy in nats, summed, and the number of tokens; no cache is filled."""
    inputs, labels = batch
    logits = model(input_ids=inputs, use_cache=False).logits
    total = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total, labels.numel()


def tune_lora(
    model: PreTrainedModel,
    batches: Batches,
    *,
    steps: int,
    lr: float,
    warmup: int = 0,
    clip: float = 1.0,
    r: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.0,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    seed: int = 0,
    directory: Path | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Low-rank adapters trained on next tokens by AdamW, then merged, in place.

    Args:
        steps, lr, warmup, clip: optimizer steps; peak learning rate, reached linearly over ``warmup`` steps, falling
            along half a cosine to a tenth; largest norm of the gradient.
        r, alpha, dropout, targets: of the adapters.
        directory: where an interrupted run keeps what it needs to go on from there; None: nowhere.

    Returns:
        steps, tokens, losses (nats per token, one a step).

    Raises:
        ValueError: a loss is not finite.
    """
    del directory
    torch.manual_seed(seed)
    apply_lora(model, targets, r, alpha, dropout)
    parameters = list(lora_parameters(model))
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses, tokens = [], 0
    model.train()
    for step in track(range(steps), "tuning", show=progress):
        rise = min(1.0, (step + 1) / max(warmup, 1))
        fall = 0.1 + 0.45 * (1 + math.cos(math.pi * max(0, step - warmup) / max(steps - warmup, 1)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rise * fall
        total, count = next_token_loss(model, batches(step))
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total.detach()) / count)
        tokens += count
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {step}: the loss is {losses[-1]}; lower lr or lengthen the warm-up")
    merge_lora(model).eval().requires_grad_(False)
    return {"steps": steps, "tokens": tokens, "losses": losses}
