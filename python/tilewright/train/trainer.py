# SPDX-License-Identifier: Apache-2.0
"""One training loop for everything: language models, synthetic tasks, distillation, adapters."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilewright._files import atomic_write
from tilewright._progress import track
from tilewright.data.recall import mix
from tilewright.train import checkpoint
from tilewright.train.checkpoint import TrainingCheckpointError
from tilewright.train.config import TrainConfig
from tilewright.train.distributed import Parallel, fill, is_sharded
from tilewright.train.losses import Loss, as_sum, device_of, evaluating, to_device, token_loss
from tilewright.train.sequence_parallel import require_pieces, sequence_parallel

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
# Settings that a resumed run may change: they say how far and how often, not what a step does.
_FREE = ("steps", "save_every")

Evaluation = Callable[[nn.Module], "float | dict[str, float]"]


class TrainingError(RuntimeError):
    """A loss or a gradient is not finite."""


@dataclass
class Progress:
    """Where a run is: what a checkpoint keeps besides tensors."""

    step: int = 0
    lr_factor: float = 1.0
    best: float = math.inf
    best_step: int = 0
    stale: int = 0
    stale_for_lr: int = 0
    stopped: bool = False


@dataclass
class Result:
    """What a run gave.

    steps: steps done. best: the best evaluation (infinite without one), made at ``best_step``. stopped_early: whether
    ``patience`` ended the run. records: one dictionary a step (``step``, ``loss``, ``lr``, ``grad_norm``, ``count``,
    ``seconds``), and one an evaluation (``step``, ``evaluation``), as in the log file.
    """

    steps: int
    best: float
    best_step: int
    stopped_early: bool
    records: list[dict[str, Any]] = field(repr=False)

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [record["loss"] for record in self.records if "loss" in record]

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The evaluations in order, each with its ``step``."""
        return [{"step": r["step"], **r["evaluation"]} for r in self.records if "evaluation" in r]


class Trainer:
    """Trains a model's parameters by AdamW.

    Args:
        model: any module. Those of its parameters that require gradients are trained.
        batches: the batch of a number, 0, 1, 2, ...: the same for the same number, in every process (see
            ``tilewright.data``: ``Stream``, ``ByteWindows``, ``Epochs``). Step s takes the numbers
            ``s * accumulate`` and following.
        config: the settings.
        loss: ``loss(model, batch)`` gives a sum and a count, or one number (see ``tilewright.train.losses``).
        evaluate: ``evaluate(model)``, called in evaluation mode without gradients, gives a number or a dictionary
            with the key "loss"; lower is better.
        trainable: ``trainable(name, parameter)`` chooses what is trained; the others are frozen here and stay so.
        directory: where ``checkpoint.pt`` and ``log.jsonl`` go; None keeps nothing.
        parallel: the processes (see :class:`tilewright.train.Parallel`); the model is sharded or made equal here.
        progress: show a bar; None: on a terminal.

    Raises:
        ValueError: nothing is to be trained, the config asks for evaluations without ``evaluate``, or sequences are to
            be cut and a layer cannot look beyond its piece.

    Example:
        >>> from tilewright.data.recall import Stream, parity
        >>> model = nn.Sequential(nn.Embedding(2, 8), nn.Linear(8, 2))
        >>> result = Trainer(model, Stream(parity, batch=4), TrainConfig(steps=3)).run()
        >>> result.steps, len(result.losses)
        (3, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[int], Any],
        config: TrainConfig,
        *,
        loss: Loss = token_loss,
        evaluate: Evaluation | None = None,
        trainable: Callable[[str, nn.Parameter], bool] | None = None,
        directory: str | Path | None = None,
        parallel: Parallel | None = None,
        progress: bool | None = None,
    ) -> None:
        if (evaluate is None) != (config.evaluate_every is None):
            raise ValueError("evaluate and config.evaluate_every go together; give both or neither")
        if trainable is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable(name, parameter))
        self.batches, self.config, self.loss, self.evaluate = batches, config, loss, evaluate
        self.parallel = parallel or Parallel()
        if self.parallel.sequence > 1:
            require_pieces(model)
        self.directory = None if directory is None else Path(directory)
        self.show = progress if self.parallel.rank == 0 else False
        # Marks and dimensions are read before sharding, which makes new parameters.
        undecayed = {name for name, p in model.named_parameters() if p.dim() < 2 or _marked(p)}
        self.model = self.parallel.prepare(model)
        trained = checkpoint.trained_parameters(self.model)
        if not trained:
            raise ValueError("no parameter requires gradients; unfreeze some, or pass trainable=")
        self.parameters = list(trained.values())
        groups = [
            {
                "params": [p for name, p in trained.items() if name not in undecayed],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for name, p in trained.items() if name in undecayed], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        self.at = Progress()
        self.records: list[dict[str, Any]] = []
        self.best_model: dict[str, Tensor] = {}

    def run(self, *, resume: bool = False) -> Result:
        """Train to the last step, or until ``patience`` ends it.

        resume: go on from the checkpoint in ``directory`` if there is one: the run then gives the same losses, bit
        for bit, as one that was never stopped.

        Raises:
            ValueError: the directory holds a run and ``resume`` is false, or ``resume`` without a directory.
            TrainingCheckpointError: the checkpoint is damaged or of another model or settings.
            TrainingError: a loss or gradient is not finite.
        """
        self._begin(resume)
        steps = range(self.at.step, self.config.steps) if not self.at.stopped else range(0)
        with torch.random.fork_rng():
            for step in track(
                steps, self._description, show=self.show, total=self.config.steps, completed=self.at.step
            ):
                self._record(self._step(step))
                self.at.step = step + 1
                last = self.at.step == self.config.steps
                if self.config.evaluate_every and (last or self.at.step % self.config.evaluate_every == 0):
                    self._evaluate()
                if last or self.at.stopped or (self.config.save_every and self.at.step % self.config.save_every == 0):
                    self._save()
                if self.at.stopped:
                    break
        if self.config.keep_best:
            tensors = checkpoint.model_tensors(self.model)
            for name, value in self.best_model.items():
                fill(tensors[name], value)
        return Result(self.at.step, self.at.best, self.at.best_step, self.at.stopped, self.records)

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its record."""
        start, config = time.perf_counter(), self.config
        device = device_of(self.model)
        torch.manual_seed(mix(config.seed, step, self.parallel.rank))
        lr = config.lr_at(step) * self.at.lr_factor
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for number in range(step * config.accumulate, (step + 1) * config.accumulate):
            batch = to_device(self.parallel.piece(self.batches(number)), device)
            with sequence_parallel(self.parallel.group):
                with torch.autocast(device.type, torch.bfloat16) if config.bf16 else nullcontext():
                    total, count = as_sum(self.loss(self.model, batch))
                total.backward()
            sums += torch.stack([total.detach().double(), torch.as_tensor(count, device=device).double()])
        total_loss, terms = self.parallel.sum(sums).tolist()
        norm = self._finish_gradients(max(terms, 1.0))
        mean = total_loss / max(terms, 1.0)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}: loss {mean}, gradient norm {norm} (lr {lr:.3g}); lower lr, lengthen the warm-up, or "
                "look at the batch of this step"
            )
        self.optimizer.step()
        seconds = time.perf_counter() - start
        return {"step": step, "loss": mean, "lr": lr, "grad_norm": norm, "count": int(terms), "seconds": seconds}

    def _finish_gradients(self, terms: float) -> float:
        """Sums of gradients over all processes made means over all terms, and clipped; returns their norm before."""
        self.parallel.sum_gradients(self.parameters)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(terms)
        norm: Any = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        return float(norm.full_tensor() if is_sharded(norm) else norm)

    def _evaluate(self) -> None:
        """Measure, and settle what follows: a new best, a lower rate, the end."""
        assert self.evaluate is not None
        with evaluating(self.model), torch.no_grad():
            value = self.evaluate(self.model)
        scores = {k: float(v) for k, v in value.items()} if isinstance(value, dict) else {"loss": float(value)}
        if "loss" not in scores:
            raise ValueError(f"evaluate returned {', '.join(scores)}; a number or a key 'loss' is needed")
        self._record({"step": self.at.step, "evaluation": scores})
        at, config = self.at, self.config
        if scores["loss"] < at.best:
            at.best, at.best_step, at.stale, at.stale_for_lr = scores["loss"], at.step, 0, 0
            if config.keep_best:
                self.best_model = checkpoint.copies(self.model)
            return
        at.stale, at.stale_for_lr = at.stale + 1, at.stale_for_lr + 1
        if config.schedule == "plateau" and at.stale_for_lr >= config.plateau_patience:
            at.lr_factor, at.stale_for_lr = at.lr_factor * config.plateau_factor, 0
        at.stopped = config.patience is not None and at.stale >= config.patience

    def _begin(self, resume: bool) -> None:
        if resume and self.directory is None:
            raise ValueError("resume=True needs a directory that holds the checkpoint")
        if self.directory is None:
            return
        path = self.directory / CHECKPOINT
        if path.exists() and not resume:
            raise ValueError(f"{path} holds a run already; resume it, or train into another directory")
        if not path.exists():
            self._write_log()
            return
        content = checkpoint.read(path)
        self._require_settings(path, content["config"])
        checkpoint.restore(path, content, self.model, self.optimizer)
        self.at, self.best_model = Progress(**content["progress"]), content["best_model"]
        log = self.directory / LOG
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        self.records = _records_until(self.at.step, lines)
        self._write_log()

    def _require_settings(self, path: Path, stored: dict[str, Any]) -> None:
        mine = self.config.to_dict()
        # A setting that the run's tilewright did not know had its default.
        stored = TrainConfig(steps=0).to_dict() | stored
        if other := [k for k in mine if k not in _FREE and stored[k] != mine[k]]:
            raise TrainingCheckpointError(
                f"{path}: the run was made with {other[0]}={stored[other[0]]}, not {mine[other[0]]} "
                f"({len(other)} settings differ); use its settings, or train into another directory"
            )

    def _save(self) -> None:
        if self.directory is None:
            return
        content = checkpoint.snapshot(self.model, self.optimizer)
        if self.parallel.rank == 0:
            settled = {"config": self.config.to_dict(), "progress": asdict(self.at), "best_model": self.best_model}
            checkpoint.write(self.directory / CHECKPOINT, {**content, **settled})
        self.parallel.barrier()

    def _record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.directory is not None and self.parallel.rank == 0:
            with (self.directory / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _write_log(self) -> None:
        """Start the log with the records so far."""
        assert self.directory is not None
        if self.parallel.rank == 0:
            with atomic_write(self.directory / LOG) as partial:
                partial.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")
        self.parallel.barrier()

    def _description(self) -> str:
        losses = [r["loss"] for r in self.records[-2:] if "loss" in r]
        return f"training, loss {losses[-1]:.4f}" if losses else "training"


def _marked(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_no_weight_decay", False))


def _records_until(step: int, lines: list[str]) -> list[dict[str, Any]]:
    """Records of the log that a checkpoint after ``step`` steps covers; a torn last line is left out."""
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] < step or ("evaluation" in record and record["step"] == step):
            records.append(record)
    return records
