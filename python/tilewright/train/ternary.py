# SPDX-License-Identifier: Apache-2.0
"""Train a BitNet b1.58 language model on text, from settings to a packed checkpoint: what `tw train-ternary` does."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tilewright._files import atomic_write
from tilewright.data import CORPORA, corpus
from tilewright.data.bytes import ByteWindows, held_out_windows
from tilewright.data.recall import Batch
from tilewright.train.config import TrainConfig
from tilewright.train.losses import evaluating, token_loss
from tilewright.train.texts import encode, read_file, read_texts, require_longer, token_lengths, tokenizer_of
from tilewright.train.trainer import CHECKPOINT, Result, Trainer

if TYPE_CHECKING:
    from transformers import BitNetForCausalLM

RUN, MODEL, TOKENIZER = "run.json", "model", "tokenizer"


@dataclass(frozen=True)
class TernaryRun:
    """A run from text to a ternary model.

    Args:
        training: the trainer's settings.
        text: corpora of ``tilewright.data`` ("speeches", "moby-dick", "encyclopedia"), "documentation", or UTF-8 files.
        held_out: corpora, of which the evaluation part is taken, or files; empty: what the texts hold out themselves
            (of a file its last twentieth).
        tokenizer: "bytes"; "bpe:N", a byte-level encoding of N tokens learned from the training text; or a model whose
            tokenizer is used.
        layers, width, inner, heads, kv_heads: of the model; ``inner`` is the MLP's width.
        hidden_act: "silu" or "relu2" (see :func:`tilewright.nn.bitnet.build_bitnet`).
        context: longest sequence of the model.
        batch, length: windows a step, and their tokens.
        evaluation_windows: held-out windows that an evaluation scores, spread over the held-out text.
        ternary: False trains the float model of the same shape in the same way.
    """

    training: TrainConfig
    text: tuple[str, ...] = ("moby-dick", "speeches")
    held_out: tuple[str, ...] = ()
    tokenizer: str = "bpe:2048"
    layers: int = 4
    width: int = 256
    inner: int = 768
    heads: int = 4
    kv_heads: int = 2
    hidden_act: str = "silu"
    context: int = 512
    batch: int = 4
    length: int = 512
    evaluation_windows: int = 32
    ternary: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON types; :meth:`from_dict` gives the same run back."""
        values: dict[str, Any] = {**asdict(self), "training": self.training.to_dict()}
        values["text"], values["held_out"] = list(self.text), list(self.held_out)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TernaryRun:
        """A run from a dictionary; an unknown key is an error that lists the known ones."""
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"unknown setting {', '.join(unknown)} of a run; known: {', '.join(known)}")
        training = TrainConfig.from_dict(values.get("training", {}))
        names: dict[str, Any] = {name: tuple(values[name]) for name in ("text", "held_out") if name in values}
        return cls(**(values | names | {"training": training}))

    @classmethod
    def read(cls, path: Path) -> TernaryRun:
        """The run that a JSON file describes; `ValueError` naming the file when it is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise TypeError("a JSON object with the settings of a run is needed")
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def train_ternary(
    run: TernaryRun, directory: Path, *, resume: bool = False, progress: bool | None = None
) -> dict[str, Any]:
    """Train, and leave in ``directory`` a packed checkpoint (folder ``model``), besides the run's checkpoint and log.

    A float run leaves a float checkpoint there. Returns what was measured (JSON values).

    Raises:
        ValueError: the directory holds a run and ``resume`` is false, a text is too short, or a setting does not fit.
        TrainingCheckpointError, TrainingError: see :meth:`tilewright.train.Trainer.run`.
    """
    if (directory / CHECKPOINT).exists() and not resume:
        raise ValueError(f"{directory} holds a run already; resume it, or train into another directory")
    training_text, held_out_text = _texts(run)
    tokenizer = _kept_tokenizer(run, directory, training_text)
    tokens, held_out = (encode(tokenizer, run.tokenizer, text) for text in (training_text, held_out_text))
    require_longer((tokens, held_out), run.length)
    model = build(run, len(tokenizer))
    windows = _spread(held_out_windows(held_out, length=run.length, batch=1), run.evaluation_windows)
    score = bits_per_byte(windows, token_lengths(tokenizer))
    with atomic_write(directory / RUN) as path:
        path.write_text(json.dumps(run.to_dict(), indent=1) + "\n", encoding="utf-8")
    trainer = Trainer(
        model,
        ByteWindows(tokens, run.batch, run.length, run.training.seed),
        run.training,
        evaluate=score if run.training.evaluate_every is not None else None,
        directory=directory,
        progress=progress,
    )
    result = trainer.run(resume=resume)
    _save(model, tokenizer, directory, run)
    everything = bits_per_byte(held_out_windows(held_out, length=run.length, batch=8), token_lengths(tokenizer))
    return _report(run, directory, model, result, everything(model), len(tokens))


def build(run: TernaryRun, vocabulary: int) -> BitNetForCausalLM:
    """The run's model before its first step."""
    from tilewright.nn.bitnet import build_bitnet

    act: Any = run.hidden_act
    with torch.random.fork_rng():
        torch.manual_seed(run.training.seed)
        return build_bitnet(
            vocab_size=vocabulary,
            hidden_size=run.width,
            intermediate_size=run.inner,
            num_layers=run.layers,
            num_heads=run.heads,
            num_kv_heads=run.kv_heads,
            max_position_embeddings=run.context,
            hidden_act=act,
            ternary=run.ternary,
        )


def bits_per_byte(windows: Iterable[Batch], lengths: Tensor) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation for the trainer: "loss" in nats a token, and "bits_per_byte" of the text that is predicted.

    windows: batches of (inputs, labels). lengths: bytes that each token stands for, int64 [V].
    """
    batches = list(windows)
    tokens = sum(labels.numel() for _, labels in batches)
    size = sum(int(lengths[labels].sum()) for _, labels in batches)

    @torch.no_grad()
    def score(model: nn.Module) -> dict[str, float]:
        with evaluating(model):
            total = sum(float(token_loss(model, batch)[0]) for batch in batches)
        return {"loss": total / tokens, "bits_per_byte": total / math.log(2) / size}

    return score


def _spread(windows: list[Batch], count: int) -> list[Batch]:
    """``count`` windows at equal distances, all when there are fewer."""
    if count >= len(windows):
        return windows
    return [windows[i * len(windows) // count] for i in range(count)]


def _texts(run: TernaryRun) -> tuple[str, str]:
    if not run.held_out:
        return read_texts(run.text)
    files = [read_file(name) if name not in CORPORA else corpus(name, "calibration") for name in run.text]
    held_out = [corpus(name, "evaluation") if name in CORPORA else read_file(name) for name in run.held_out]
    return "\n".join(files), "\n".join(held_out)


def _kept_tokenizer(run: TernaryRun, directory: Path, training_text: str) -> Any:
    """The tokenizer that the run began with, made at its beginning."""
    from transformers import PreTrainedTokenizerFast

    place = directory / TOKENIZER
    if not (place / "tokenizer.json").exists():
        tokenizer_of(run.tokenizer, training_text).save_pretrained(str(place))
    return PreTrainedTokenizerFast.from_pretrained(str(place), local_files_only=True)


def _save(model: BitNetForCausalLM, tokenizer: Any, directory: Path, run: TernaryRun) -> None:
    from tilewright.models import save
    from tilewright.models.bitnet import from_bitnet

    model.eval()
    loaded = from_bitnet(model, tokenizer)
    kind = "ternary (BitNet b1.58)" if run.ternary else "float"
    loaded.notes.append(f"{kind}, trained by tw train-ternary, {run.training.steps} steps")
    save(loaded, directory / MODEL)


def _report(
    run: TernaryRun,
    directory: Path,
    model: nn.Module,
    result: Result,
    held_out: dict[str, float],
    tokens: int,
) -> dict[str, Any]:
    losses = result.losses
    return {
        "output": str(directory / MODEL),
        "ternary": run.ternary,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": result.steps,
        "tokens_seen": result.steps * run.training.accumulate * run.batch * run.length,
        "tokens_of_text": tokens,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out_loss": held_out["loss"],
        "held_out_bits_per_byte": held_out["bits_per_byte"],
    }
