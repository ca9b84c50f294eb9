# SPDX-License-Identifier: Apache-2.0
"""Train a hybrid language model on text, from settings to a folder that generates: what `tw train` does."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilewright._files import atomic_write
from tilewright.data.bytes import ByteWindows, held_out_windows
from tilewright.train.config import TrainConfig
from tilewright.train.distributed import Parallel, whole
from tilewright.train.losses import mean_loss
from tilewright.train.texts import BYTES, encode, read_texts, require_longer, tokenizer_of
from tilewright.train.trainer import CHECKPOINT, Result, Trainer

if TYPE_CHECKING:
    from tilewright.nn import HybridForCausalLM

RUN = "run.json"


@dataclass(frozen=True)
class LanguageRun:
    """A run from text to model.

    Args:
        training: the trainer's settings.
        text: corpora of ``tilewright.data`` ("speeches", "moby-dick", "encyclopedia"), "documentation" (docstrings of
            installed packages), or UTF-8 files. Of a file the last twentieth is held out; the others bring their own
            held-out text.
        tokenizer: "bytes", or a model folder or GGUF file whose tokenizer is used.
        mixer, ratio: of the linear layers, and linear to softmax layers (see ``tilewright.nn.build_hybrid``).
        layers, width, heads: of the model.
        batch, length: windows a step, and their tokens.
        evaluation_windows: held-out windows that an evaluation scores, at most (in whole batches, at least one).
        model_options: further keyword arguments of ``build_hybrid``.
    """

    training: TrainConfig
    text: tuple[str, ...] = ("speeches", "moby-dick")
    tokenizer: str = BYTES
    mixer: str = "gated_deltanet"
    ratio: str = "3:1"
    layers: int = 4
    width: int = 128
    heads: int = 4
    batch: int = 16
    length: int = 256
    evaluation_windows: int = 32
    model_options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; :meth:`from_dict` gives the same run back."""
        return {**asdict(self), "training": self.training.to_dict(), "text": list(self.text)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LanguageRun:
        """A run from a dictionary; an unknown key is an error that lists the known ones."""
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"unknown setting {', '.join(unknown)} of a run; known: {', '.join(known)}")
        training = TrainConfig.from_dict(values.get("training", {}))
        text = values.get("text", cls.text)
        text = (text,) if isinstance(text, str) else tuple(text)
        return cls(**{**values, "training": training, "text": text})


def read_run(path: Path) -> LanguageRun:
    """The run that a JSON file describes; `ValueError` naming the file when it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON object with the settings of a run is needed")
    try:
        return LanguageRun.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def train_language(
    run: LanguageRun,
    directory: Path,
    *,
    resume: bool = False,
    parallel: Parallel | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train, and leave in ``directory`` a transformers folder besides the run's checkpoint and log.

    Returns what was measured (JSON values). Errors are those of :meth:`tilewright.train.Trainer.run`, and `ValueError`
    for a text that is too short or a setting of the model that does not fit.
    """
    from tilewright.models.hybrid import save_hybrid

    parallel = parallel or Parallel()
    if (directory / CHECKPOINT).exists() and not resume:
        raise ValueError(f"{directory} holds a run already; resume it, or train into another directory")
    tokenizer = tokenizer_of(run.tokenizer, read_texts(run.text)[0])
    texts, held_out = _texts(run, tokenizer)
    windows = held_out_windows(held_out, length=run.length, batch=run.batch)
    windows = windows[: max(1, run.evaluation_windows // run.batch)]
    model = _model(run, len(tokenizer))
    evaluates = run.training.evaluate_every is not None
    if parallel.rank == 0:
        with atomic_write(directory / RUN) as path:
            path.write_text(json.dumps(run.to_dict(), indent=1) + "\n", encoding="utf-8")
    trainer = Trainer(
        model,
        ByteWindows(texts, run.batch, run.length, run.training.seed),
        run.training,
        evaluate=(lambda m: mean_loss(m, windows)) if evaluates else None,
        directory=directory,
        parallel=parallel,
        progress=progress,
    )
    result = trainer.run(resume=resume)
    final = mean_loss(trainer.model, windows)
    state = {name: whole(value) for name, value in trainer.model.state_dict().items()}
    if parallel.rank == 0:
        made = _model(run, len(tokenizer))
        made.load_state_dict(state)
        save_hybrid(made, tokenizer, directory)
    parallel.barrier()
    return _report(run, directory, state, result, final)


def _report(
    run: LanguageRun, directory: Path, state: dict[str, Tensor], result: Result, final: float
) -> dict[str, Any]:
    bits = final / math.log(2) if run.tokenizer == BYTES else None
    losses = result.losses
    return {
        "output": str(directory),
        "parameters": sum(value.numel() for value in state.values()),
        "steps": result.steps,
        "stopped_early": result.stopped_early,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out_loss": final,
        "bits_per_byte": bits,
    }


def _model(run: LanguageRun, vocabulary: int) -> HybridForCausalLM:
    from tilewright.nn import build_hybrid

    with torch.random.fork_rng():
        torch.manual_seed(run.training.seed)
        return build_hybrid(
            run.mixer,
            run.ratio,
            num_layers=run.layers,
            hidden_size=run.width,
            num_heads=run.heads,
            vocab_size=vocabulary,
            **run.model_options,
        )


def _texts(run: LanguageRun, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Training and held-out tokens of all texts, one after another."""
    training, held_out = (encode(tokenizer, run.tokenizer, text) for text in read_texts(run.text))
    require_longer((training, held_out), run.length)
    return training, held_out
