# SPDX-License-Identifier: Apache-2.0
"""LinEAS: all maps trained together by proximal gradient steps on the distributional loss (arXiv 2503.10679)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tilewright._progress import track
from tilewright.capture import ActivationMap
from tilewright.steer.activations import Collector, blocks_of, take
from tilewright.steer.lineas.checkpointing import checkpointed
from tilewright.steer.lineas.loss import Normalize, distributional_losses
from tilewright.steer.lineas.prox import prox_sparse_group
from tilewright.steer.problem import Problem
from tilewright.steer.steering import Steering

# Activations kept for the backward pass that are worth a third more work to avoid.
_CHECKPOINT_BYTES = 2**31
# Floats that a block keeps for each token and coordinate of the residual stream: norms, projections, an MLP of 8/3.
_KEPT_FLOATS = 24
_HALVINGS = 12
# A step behind which the loss is so many times what it was is taken back. Batches differ by less.
_DIVERGED = 1.5
# Adam's constants (arXiv 1412.6980).
_ADAM_DECAYS, _ADAM_EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class LinEASConfig:
    """How the maps are trained.

    Attributes:
        steps, lr, batch_size: gradient steps; their size, decayed by ``schedule`` to 0; texts of each side in a step
            (all of them where there are no more).
        optimizer: "sgd", the paper's; or "adam", which gives every coordinate a step of its own size: activations of
            some models differ by orders between coordinates, and the largest then decides the step that all can take.
            Its proximal step is the one in the metric of those sizes, so that gamma means the same under both.
        gamma: weight of the regulariser ``lambda_1 ||.||_1 + lambda_g sqrt(C) ||.||_2`` on w - 1 and on b; 0: none.
        schedule: "cosine" or "constant".
        normalize: of the loss, see :func:`distributional_losses`.
        prox_lr: thresholds are multiplied by the step size, as in a proximal step; False: as printed in the paper.
        final_threshold: one more threshold at the end, with the mean step size: decides the support exactly.
        clip: longest gradient, over all maps; None: any.
        checkpoint: recompute blocks in the backward pass; None: where activations would exceed 2 GiB.
        seed: of the batches.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = 1000
    lr: float = 0.1
    batch_size: int = 32
    optimizer: Literal["sgd", "adam"] = "sgd"
    gamma: float = 0.0
    lambda_1: float = 1.0
    lambda_g: float = 1.0
    schedule: Literal["cosine", "constant"] = "cosine"
    normalize: Normalize = "none"
    prox_lr: bool = True
    final_threshold: bool = False
    clip: float | None = None
    checkpoint: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"LinEAS: {name} = {getattr(self, name)}, needed >= 1")
        for name in ("gamma", "lambda_1", "lambda_g"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"LinEAS: {name} = {getattr(self, name)}, needed a number >= 0")
        if not 0 < self.lr < math.inf or (self.clip is not None and not self.clip > 0):
            raise ValueError(f"LinEAS: lr = {self.lr}, clip = {self.clip}, needed numbers > 0")
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"LinEAS: optimizer = {self.optimizer!r}, needed 'sgd' or 'adam'")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"LinEAS: schedule = {self.schedule!r}, needed 'cosine' or 'constant'")

    def step_size(self, step: int) -> float:
        """Of step 0 .. steps - 1."""
        return self.lr * (0.5 + 0.5 * math.cos(math.pi * step / self.steps) if self.schedule == "cosine" else 1.0)


def fit(problem: Problem, config: LinEASConfig, *, progress: bool | None = None) -> Steering:
    """Train the maps of a problem. The model's weights get no gradients and are not changed.

    Raises:
        ValueError: an activation is not finite (the place is named), or training diverges at every step size tried.
    """
    training = Training(problem, config)
    with _frozen(problem.model), training.ready() as run:
        for step in track(range(config.steps), training.describe, show=progress):
            training.step(run, step)
    if config.final_threshold:
        mean = sum(config.step_size(step) for step in range(config.steps)) / config.steps
        training.shrink(mean * training.scale)
    return training.steering()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)


class Training:
    """The state of one training: parameters by place, what is wanted, what was measured."""

    def __init__(self, problem: Problem, config: LinEASConfig) -> None:
        self.problem, self.config = problem, config
        self.target = problem.pooled(problem.target)
        self.w = {name: torch.ones(v.shape[1], device=v.device, requires_grad=True) for name, v in self.target.items()}
        self.b = {name: torch.zeros(v.shape[1], device=v.device, requires_grad=True) for name, v in self.target.items()}
        self.history: list[float] = []
        self.layers: dict[str, float] = {}
        self.scale, self.halvings = 1.0, 0
        self.random = torch.Generator().manual_seed(config.seed)
        self._good = self._starts = self._copy()
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self._good]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.w.values(), *self.b.values()]

    def describe(self) -> str:
        """For the progress bar."""
        return f"LinEAS, loss {self.history[-1]:.4g}" if self.history else "LinEAS"

    @contextlib.contextmanager
    def ready(self) -> Iterator[Collector]:
        """The model with maps in place, gradients flowing from each to all later ones."""

        def change(name: str, x: Tensor, mask: Tensor) -> Tensor:
            del mask
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return (wide * self.w[name].to(wide) + self.b[name].to(wide)).to(x.dtype)

        model, names = self.problem.model, list(self.target)
        wanted = self.config.checkpoint
        saving = self._kept_bytes() > _CHECKPOINT_BYTES if wanted is None else wanted
        with contextlib.ExitStack() as stack:
            if saving:
                stack.enter_context(checkpointed(model, names[-1]))
            yield stack.enter_context(Collector(model, names, self.problem.pooling, change))

    def _kept_bytes(self) -> int:
        ids = self.problem.source["input_ids"]
        width = max(v.shape[1] for v in self.target.values())
        tokens = min(len(ids), self.config.batch_size) * ids.shape[1]
        return 4 * tokens * width * _KEPT_FLOATS * max(len(blocks_of(self.problem.model)), 1)

    def step(self, run: Collector, step: int) -> None:
        """One gradient and proximal step; a step that diverged is taken back and the step size halved."""
        losses = self._losses(run)
        total = torch.stack(list(losses.values())).sum()
        value = float(total.detach())
        if not math.isfinite(value) or (self.history and value > _DIVERGED * self.history[-1]):
            self._go_back({name: float(loss.detach()) for name, loss in losses.items()})
            return
        gradients = torch.autograd.grad(total, self.parameters)
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            self._go_back({})
            return
        self._good = self._copy()
        self.history.append(value)
        self.layers = {name: float(loss.detach()) for name, loss in losses.items()}
        lr = self.config.step_size(step) * self.scale
        factor = 1.0
        if self.config.clip is not None:
            length = float(torch.stack([g.norm() for g in gradients]).norm())
            factor = min(1.0, self.config.clip / length) if length > 0 else 1.0
        with torch.no_grad():
            for parameter, change in zip(self.parameters, self._directions(gradients), strict=True):
                parameter -= lr * factor * change
        self.shrink(lr)

    def _directions(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.config.optimizer == "sgd":
            return gradients
        found = []
        for (mean, square), g in zip(self._moments, gradients, strict=True):
            mean.lerp_(g, 1 - _ADAM_DECAYS[0])
            square.lerp_(g * g, 1 - _ADAM_DECAYS[1])
        first = 1 - _ADAM_DECAYS[0] ** len(self.history)
        for (mean, _), metric in zip(self._moments, self._metrics(), strict=True):
            assert metric is not None
            found.append(mean / first / metric)
        return found

    def _metrics(self) -> list[Tensor | None]:
        """What each parameter's step is divided by; None: nothing."""
        if self.config.optimizer == "sgd":
            return [None] * len(self._moments)
        second = 1 - _ADAM_DECAYS[1] ** max(len(self.history), 1)
        return [(square / second).sqrt() + _ADAM_EPS for _, square in self._moments]

    def _losses(self, run: Collector) -> dict[str, Tensor]:
        source, target = self.problem.source, self.target
        seen = run(take(source, self._rows(len(source["input_ids"]))))
        some = self._rows(len(next(iter(target.values()))))
        return distributional_losses(
            seen, {name: target[name][some.to(target[name].device)] for name in seen}, self.config.normalize
        )

    def _rows(self, count: int) -> Tensor:
        if count <= self.config.batch_size:
            return torch.arange(count)
        return torch.randperm(count, generator=self.random)[: self.config.batch_size]

    def shrink(self, lr: float) -> None:
        """The proximal step of the regulariser on w - 1 and on b of every place."""
        c = self.config
        if c.gamma == 0.0:
            return
        t = c.gamma * (lr if c.prox_lr else 1.0)
        with torch.no_grad():
            for parameter, start, metric in zip(self.parameters, self._starts, self._metrics(), strict=True):
                tg = t * c.lambda_g * math.sqrt(len(parameter))
                parameter.copy_(start + prox_sparse_group(parameter - start, t * c.lambda_1, tg, metric))

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def _go_back(self, losses: dict[str, float]) -> None:
        worst = next((name for name, loss in losses.items() if not math.isfinite(loss)), None)
        where = f"the loss at {worst} is not finite" if worst else "the loss grew without bound"
        if not self.history:
            raise ValueError(f"LinEAS: {where} before the first step; the model or its input is damaged")
        self.halvings += 1
        if self.halvings > _HALVINGS:
            raise ValueError(
                f"LinEAS: {where} at every step size down to {self.config.lr * self.scale:.2g}; lower lr, set clip, "
                "or use normalize='std' where activations are large"
            )
        self.scale /= 2
        with torch.no_grad():
            for parameter, good in zip(self.parameters, self._good, strict=True):
                parameter.copy_(good)

    def steering(self) -> Steering:
        """The maps as they are, with what was measured on the way."""
        maps = {name: ActivationMap(w.detach().cpu(), self.b[name].detach().cpu()) for name, w in self.w.items()}
        settings: dict[str, Any] = {**dataclasses.asdict(self.config), "pooling": self.problem.pooling}
        report = {"loss": self.history, "layers": self.layers, "lr_halvings": self.halvings}
        return Steering(maps, "lineas", settings, report)
