# SPDX-License-Identifier: Apache-2.0
"""Tuning a converted model by adapters: the stage that all methods end with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tilewright.adapt import apply_lora, merge_lora
from tilewright.train import TrainConfig, Trainer
from tilewright.train.trainer import CHECKPOINT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batches = Callable[[int], "tuple[Tensor, Tensor]"]
"""The batch of a number 0, 1, 2, ...: inputs and labels int64 [B, T] (:class:`tilewright.data.bytes.ByteWindows`)."""
_SAVE_EVERY = 50


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Cross-entropy in nats, summed, and the number of tokens; no cache is filled.

    batch: token ids int64 [B, T], or their embeddings [B, T, width]; labels int64 [B, T].
    """
    inputs, labels = batch
    given = {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs}
    logits: Tensor = model(**given, use_cache=False).logits
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
    also: Sequence[str] = (),
    seed: int = 0,
    directory: Path | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Low-rank adapters trained on next tokens by AdamW without weight decay, then merged, in place.

    Args:
        steps, lr, warmup, clip: optimizer steps; peak learning rate, reached linearly over ``warmup`` steps (at most
            all of them), falling along half a cosine to a tenth; largest norm of the gradient.
        r, alpha, dropout, targets: of the adapters.
        also: last parts of the names of further parameters to train.
        directory: where an interrupted run keeps what it needs, and goes on from if it is there; None: nowhere.

    Returns:
        steps, tokens, losses (nats per token, one a step).

    Raises:
        ValueError: no layer has a target's name. TrainingCheckpointError: the directory holds another run.
        TrainingError: a loss or gradient is not finite.
    """
    torch.manual_seed(seed)
    apply_lora(model, targets, r, alpha, dropout)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in also:
            parameter.requires_grad_(True)
    config = TrainConfig(
        steps, lr, warmup=min(warmup, steps), clip=clip, weight_decay=0.0, seed=seed,
        save_every=None if directory is None else _SAVE_EVERY,
    )  # fmt: skip
    trainer = Trainer(model, batches, config, loss=next_token_loss, directory=directory, progress=progress)
    result = trainer.run(resume=directory is not None and (directory / CHECKPOINT).exists())
    merge_lora(model).eval().requires_grad_(False)
    counts = [record["count"] for record in result.records if "count" in record]
    return {"steps": result.steps, "tokens": sum(counts), "losses": result.losses}
