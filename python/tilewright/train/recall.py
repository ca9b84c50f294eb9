# SPDX-License-Identifier: Apache-2.0
"""How the claims train small models on recall: one recipe, so that only the token mixer differs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from tilewright.data.recall import Batch, Curriculum
from tilewright.train.config import TrainConfig
from tilewright.train.losses import Loss, token_accuracy, token_loss
from tilewright.train.trainer import Trainer

HELD_OUT_SEED = 1 << 20
"""Of the sequences that measure; training takes the small numbers."""


@dataclass(frozen=True)
class RecallRecipe:
    """Multi-query recall by AdamW: few pairs first, a tenth of the steps to warm up, then half a cosine to zero.

    Every query of a sequence counts in the loss. The peak rate is not part of the recipe: it has to be tuned for each
    competitor.

    data: the task, its sizes and the number of steps; its seed is the run's. weight_decay: of AdamW.
    """

    data: Curriculum
    weight_decay: float = 0.1

    def config(self, rate: float, seed: int) -> TrainConfig:
        """Settings of the trainer at one peak rate."""
        steps = self.data.steps
        return TrainConfig(
            steps, rate, warmup=max(1, steps // 10), final_lr=0.0, weight_decay=self.weight_decay, seed=seed
        )

    def held_out(self, batches: int = 4, batch: int = 64) -> list[Batch]:
        """Sequences with all pairs, the same for every competitor."""
        return [self.data.draw(batch, HELD_OUT_SEED + i) for i in range(batches)]


@dataclass
class RecallResult:
    """accuracy: share of the queries answered at the end. curve: (step, accuracy) on the way, the end included."""

    accuracy: float
    curve: list[tuple[int, float]] = field(default_factory=list)


def train_recall(
    model: nn.Module, recipe: RecallRecipe, rate: float, seed: int, *, loss: Loss = token_loss, marks: int = 1
) -> RecallResult:
    """Train a model [B, T] -> logits [B, T, V] in place; its accuracy is taken at ``marks`` evenly spread steps.

    loss: what a step descends, for models with a term of their own.
    """
    held_out = recipe.held_out()
    config = replace(recipe.config(rate, seed), evaluate_every=max(1, recipe.data.steps // marks))

    def evaluate(trained: nn.Module) -> float:
        return 1.0 - token_accuracy(trained, held_out)

    trainer = Trainer(model, replace(recipe.data, seed=seed), config, loss=loss, evaluate=evaluate, progress=False)
    curve = [(int(e["step"]), 1.0 - e["loss"]) for e in trainer.run().evaluations]
    return RecallResult(curve[-1][1], curve)
