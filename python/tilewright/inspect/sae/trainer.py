# SPDX-License-Identifier: Apache-2.0
"""Training an SAE on recorded activations, with checkpoint and resume."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright._progress import track
from tilewright.inspect.sae.config import SAEConfig
from tilewright.inspect.sae.losses import batch_loss, fired
from tilewright.inspect.sae.module import SAE, BatchTopKSAE, JumpReLUSAE, TopKSAE
from tilewright.inspect.sae.rows import Rows


class SAETrainer:
    """Trains one SAE.

    >>> import torch
    >>> rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    >>> trainer = SAETrainer(SAEConfig(width=16, k=4, steps=20, batch=64, lr=1e-2))
    >>> sae = trainer.fit(rows)
    >>> recon, latents = sae(rows)
    >>> latents.shape, trainer.history[-1]["fvu"] < trainer.history[0]["fvu"]
    (torch.Size([256, 16]), True)

    ``history`` holds one dictionary a step: fvu, l0, loss, auxk.
    """

    def __init__(self, config: SAEConfig) -> None:
        self.config = config
        self.history: list[dict[str, float]] = []

    def fit(
        self,
        activations: Rows | Tensor | Any,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 500,
        metadata: dict[str, Any] | None = None,
        progress: bool | None = None,
    ) -> SAE:
        """Train on rows [n, d] (a tensor, a store with one point, or :class:`Rows`); the SAE in evaluation mode.

        checkpoint: a file written every ``every`` steps and at the end; a run with the same settings and rows goes on
        from it, to the same bits. metadata: kept in the SAE's file.

        Raises:
            ValueError: fewer rows than a batch, NaN in a row (named), a loss that is not finite, or a checkpoint of
                another run.
        """
        rows = activations if isinstance(activations, Rows) else Rows(activations)
        config = self.config
        state = TrainingState(config, rows)
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and path.is_file():
            self.history = state.resume(path)
        else:
            self.history = []
            state.start()
        batches = rows.shuffled(config.batch, config.seed, first=state.step, buffer=config.buffer)
        steps = range(state.step, config.steps)
        for step in track(steps, self._described, total=config.steps, show=progress, completed=state.step):
            self.history.append(state.advance(next(batches)))
            if path is not None and ((step + 1) % every == 0 or step + 1 == config.steps):
                state.save(path, self.history)
        return state.finished({**(metadata or {}), "training": config.to_dict()})

    def _described(self) -> str:
        last = self.history[-1] if self.history else {"fvu": float("nan")}
        return f"SAE {self.config.width}, FVU {last['fvu']:.3f}"


def make_sae(config: SAEConfig, d_in: int) -> SAE:
    """The untrained SAE of a configuration."""
    if config.kind == "topk":
        sae: SAE = TopKSAE(d_in, config.width, config.k)
    elif config.kind == "batchtopk":
        sae = BatchTopKSAE(d_in, config.width, config.k)
    else:
        sae = JumpReLUSAE(d_in, config.width, bandwidth=config.bandwidth, threshold=config.threshold)
    sae.reset(torch.Generator().manual_seed(config.seed))
    return sae


def geometric_median(rows: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to rows [n, d], by Weiszfeld's iteration: [d]."""
    center = rows.mean(0)
    for _ in range(iterations):
        weight = 1 / (rows - center).norm(dim=1).clamp_min(1e-12)
        moved = (weight[:, None] * rows).sum(0) / weight.sum()
        if float((moved - center).norm()) <= tolerance * float(center.norm() + 1e-12):
            return moved
        center = moved
    return center


def normalization(rows: Rows, config: SAEConfig) -> tuple[Tensor, float]:
    """(mean [d], scale): what training subtracts and then multiplies with."""
    mean, square, count = torch.zeros(rows.width, dtype=torch.float64), 0.0, 0
    if config.normalize == "none":
        return mean.float(), 1.0
    for block in rows.blocks():
        some = block[: config.normalize_rows - count].double()
        mean += some.sum(0)
        square += float(some.square().sum())
        count += len(some)
        if count >= config.normalize_rows:
            break
    mean /= count
    if config.normalize == "scale":
        mean.zero_()
    spread = square / count - float(mean.square().sum())
    if not spread > 0:
        raise ValueError("activations: all rows are equal, so there is no scale; pass normalize='none', or other rows")
    return mean.float(), (rows.width / spread) ** 0.5


class TrainingState:
    """Everything that changes while an SAE is trained."""

    def __init__(self, config: SAEConfig, rows: Rows) -> None:
        self.config, self.rows = config, rows
        self.sae = make_sae(config, rows.width).train()
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=config.rate, betas=config.adam_betas, fused=True)
        self.mean, self.scale = torch.zeros(rows.width), 1.0
        self.since_fired = torch.zeros(config.width, dtype=torch.int64)
        self.step = 0

    def start(self) -> None:
        """Normalisation, and the decoder's bias from the first batch."""
        self.mean, self.scale = normalization(self.rows, self.config)
        first = next(self.rows.shuffled(self.config.batch, self.config.seed, buffer=self.config.buffer))
        with torch.no_grad():
            self.sae.b_dec.copy_(geometric_median((first - self.mean) * self.scale))

    def advance(self, x: Tensor) -> dict[str, float]:
        """One step on raw rows [T, d]."""
        config, sae = self.config, self.sae
        x = (x - self.mean) * self.scale
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate_at(self.step)
        dead = self.since_fired >= config.dead_after
        loss = batch_loss(sae, x, config, self.step, dead)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        remove_parallel(sae)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), config.grad_clip)
        self.optimizer.step()
        sae.normalize_decoder()
        self.since_fired += len(x)
        self.since_fired[fired(loss.codes)] = 0
        self.step += 1
        total = float(loss.total.detach())
        if not total < float("inf"):
            raise ValueError(f"the loss is {total} at step {self.step}; lower lr, or look at the activations' scale")
        return {"loss": total, "fvu": loss.fvu, "l0": loss.l0, "auxk": loss.auxk}

    def _identity(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "rows": len(self.rows), "width": self.rows.width}

    def save(self, path: Path, history: list[dict[str, float]]) -> None:
        from tilewright.train.checkpoint import snapshot, write

        content = snapshot(self.sae, self.optimizer)
        keys = ("loss", "fvu", "l0", "auxk")
        content["sae"] = self._identity() | {
            "step": self.step,
            "mean": self.mean,
            "scale": self.scale,
            "since_fired": self.since_fired,
            "history": {key: [one[key] for one in history] for key in keys},
        }
        write(path, content)

    def resume(self, path: Path) -> list[dict[str, float]]:
        """Go on from a checkpoint; returns the history until there."""
        from tilewright.train.checkpoint import read, restore

        content = read(path)
        kept = content.get("sae")
        if kept is None:
            raise ValueError(f"{path}: not the checkpoint of an SAE's training; name another file")
        mine = self._identity()
        for key, value in mine.items():
            theirs = kept[key]
            if key == "config":
                theirs = SAEConfig(**{**theirs, "betas": theirs["betas"] and tuple(theirs["betas"])}).to_dict()
                other = [name for name in value if theirs[name] != value[name]]
                if other:
                    name = other[0]
                    raise ValueError(
                        f"{path}: its {name} is {theirs[name]}, this run's {value[name]}; name another file"
                    )
            elif theirs != value:
                raise ValueError(f"{path}: its activations have {key} {theirs}, these {value}; name another file")
        restore(path, content, self.sae, self.optimizer)
        self.step, self.mean, self.scale = kept["step"], kept["mean"], kept["scale"]
        self.since_fired = kept["since_fired"]
        columns = kept["history"]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def finished(self, metadata: dict[str, Any]) -> SAE:
        """The SAE of raw activations: normalisation folded in."""
        sae = self.sae.eval()
        sae.zero_grad(set_to_none=True)
        sae.fold(self.mean, self.scale)
        sae.metadata = metadata
        return sae


@torch.no_grad()
def remove_parallel(sae: SAE) -> None:
    """Take from each decoder row's gradient what would only change the row's length."""
    grad, weight = sae.W_dec.grad, sae.W_dec
    if grad is not None:
        grad.sub_((grad * weight).sum(1, keepdim=True) * weight)
