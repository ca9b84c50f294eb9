# SPDX-License-Identifier: Apache-2.0
"""Settings of a training run, and the learning rate that they give each step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Schedule = Literal["cosine", "linear", "constant", "plateau", "wsd"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, a schedule, and when to look, save and stop.

    Args:
        steps: optimizer steps.
        lr: peak learning rate.
        schedule: after the warm-up, "cosine" or "linear" fall to ``final_lr * lr`` at the last step, "constant" stays,
            "plateau" multiplies by ``plateau_factor`` after ``plateau_patience`` evaluations without a new best one,
            "wsd" stays and falls linearly to ``final_lr * lr`` over the last ``decay`` of all steps, so that a run
            whose ``steps`` are changed on the way has trained no step in vain (arXiv 2404.06395, section 4).
        decay: see "wsd".
        warmup: steps over which the rate rises linearly from ``lr / warmup``.
        betas, eps, weight_decay: of AdamW. Parameters of fewer than two dimensions, and those that carry a true
            attribute ``_no_weight_decay``, are not decayed.
        clip: largest Euclidean norm of all gradients together; None: no limit.
        accumulate: batches whose gradients make one step, weighted by what each counts.
        bf16: run the loss under bfloat16 autocast; parameters and optimizer stay as they are.
        seed: of torch's generator; each step starts from a seed of its own (so a resumed run draws the same numbers).
        evaluate_every: steps between evaluations (one follows the last step too); None: never.
        patience: stop after so many evaluations without a new best one; None: do not.
        keep_best: end with the weights of the best evaluation instead of the last step's.
        save_every: steps between checkpoints (one follows the last step too, when there is a directory).
    """

    steps: int
    lr: float = 1e-3
    schedule: Schedule = "cosine"
    warmup: int = 0
    final_lr: float = 0.1
    decay: float = 0.2
    plateau_factor: float = 0.1
    plateau_patience: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0
    accumulate: int = 1
    bf16: bool = False
    seed: int = 0
    evaluate_every: int | None = None
    patience: int | None = None
    keep_best: bool = False
    save_every: int | None = None

    def __post_init__(self) -> None:
        _require(self.schedule in get_args(Schedule), "schedule", self.schedule, f"one of {get_args(Schedule)}")
        _require(self.steps >= 0, "steps", self.steps, "0 or more")
        _require(self.lr > 0, "lr", self.lr, "above 0")
        _require(0 <= self.warmup <= self.steps, "warmup", self.warmup, f"0 to steps={self.steps}")
        _require(0 <= self.final_lr <= 1, "final_lr", self.final_lr, "a share of lr, 0 to 1")
        _require(0 < self.decay <= 1, "decay", self.decay, "a share of the steps, above 0, at most 1")
        _require(0 < self.plateau_factor < 1, "plateau_factor", self.plateau_factor, "between 0 and 1")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two in [0, 1)")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        for name in ("accumulate", "plateau_patience"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("clip", "evaluate_every", "patience", "save_every"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0, or None")
        needs_evaluation = self.schedule == "plateau" or self.patience is not None or self.keep_best
        if needs_evaluation and self.evaluate_every is None:
            raise ValueError("evaluate_every=None: schedule='plateau', patience and keep_best need evaluations; set it")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0; without the reductions of a plateau."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule in ("constant", "plateau"):
            return self.lr
        if self.schedule == "wsd":
            falling = max(round(self.decay * self.steps), 1)
            left = min((self.steps - step) / (falling + 1), 1.0)
            return self.lr * (self.final_lr + (1 - self.final_lr) * left)
        share = (step - self.warmup) / max(self.steps - self.warmup - 1, 1)
        fallen = 0.5 * (1 + math.cos(math.pi * share)) if self.schedule == "cosine" else 1 - share
        return self.lr * (self.final_lr + (1 - self.final_lr) * fallen)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; :meth:`from_dict` gives the same settings back."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Settings from a dictionary; an unknown key is an error that lists the known ones."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"unknown training setting {', '.join(unknown)}; known: {', '.join(known)}")
        if "steps" not in values:
            raise ValueError("the training settings name no steps; give steps")
        betas = tuple(values.get("betas", cls.betas))
        return cls(**{**values, "betas": betas})


def _require(holds: bool, name: str, got: object, need: str) -> None:
    if not holds:
        raise ValueError(f"{name}={got!r}: {need} needed")
