# SPDX-License-Identifier: Apache-2.0
"""One cell of a study: a hybrid stack of one mixer, ratio, learning rate and seed, trained and measured on a task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tilewright.data.bytes import VOCABULARY, ByteWindows, byte_text, held_out_windows
from tilewright.data.recall import ANSWERS, IGNORE, Batch, Stream, key_value_recall, keys_of, mix, multi_query_recall
from tilewright.nn.hybrid_linear_attention.layout import Placement

Task = Literal["mqar", "kv", "lm"]
TASKS: tuple[str, ...] = get_args(Task)
FULL = "full"
SOFTMAX = "softmax"
EVALUATION_SEED = 1 << 20
BINS = 8
FEWEST = 2


@dataclass(frozen=True)
class Setting:
    """What all cells of a study share.

    Args:
        task: "mqar" (multi-query recall, a token for each key and value), "kv" (recall of pairs of one token, see
            :func:`tilewright.data.recall.key_value_recall`) or "lm" (bytes of text).
        num_layers, hidden_size, num_heads: of the stack.
        steps, batch, length: of the training, in tokens of `length` times `batch` a step.
        pairs, vocabulary: of the recall tasks.
        short_conv: short convolutions in the linear mixers that have them; None leaves each mixer as published.
        placement: of the full layers in their groups.
        initializer_range: standard deviation of the initial weights.
        text: what "lm" reads ("documentation" of installed packages, or a corpus of ``tilewright.data``).
        evaluation: sequences that the score is taken over.

    Raises:
        ValueError: an unknown task.
    """

    task: Task = "mqar"
    num_layers: int = 8
    hidden_size: int = 64
    num_heads: int = 4
    steps: int = 1000
    batch: int = 32
    length: int = 128
    pairs: int = 16
    vocabulary: int = 64
    short_conv: bool | None = None
    placement: Placement = "last"
    initializer_range: float = 0.02
    weight_decay: float = 0.01
    text: str = "documentation"
    evaluation: int = 256

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not known; choose one of {', '.join(TASKS)}")

    @property
    def higher_is_better(self) -> bool:
        """Recall is scored by accuracy, text by loss."""
        return self.task != "lm"

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Cell:
    """Mixer, ratio, peak learning rate and seed of one training; the mixer of the ratio "full" is "softmax"."""

    mixer: str
    ratio: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Its name in a study's file."""
        return f"{self.mixer} {self.ratio} {self.rate:g} {self.seed}"


def build(setting: Setting, cell: Cell) -> Any:
    """The cell's model. Cells of one seed agree in every weight that their stacks share."""
    from tilewright.nn.hybrid_linear_attention.build import build_hybrid

    torch.manual_seed(mix(cell.seed, 1))
    vocabulary = VOCABULARY if setting.task == "lm" else setting.vocabulary
    return build_hybrid(
        "deltanet" if cell.ratio == FULL else cell.mixer,
        cell.ratio,
        num_layers=setting.num_layers,
        hidden_size=setting.hidden_size,
        num_heads=setting.num_heads,
        vocab_size=vocabulary,
        placement=setting.placement,
        mixer_options=_mixer_options(setting, cell),
        initializer_range=setting.initializer_range,
        use_cache=False,
    )


def _mixer_options(setting: Setting, cell: Cell) -> dict[str, Any]:
    import inspect

    from tilewright.nn import mixers

    if setting.short_conv is None or cell.ratio == FULL:
        return {}
    known = inspect.signature(mixers.find(cell.mixer)).parameters
    return {"use_short_conv": setting.short_conv} if "use_short_conv" in known else {}


def execute(setting: Setting, cell: Cell) -> dict[str, Any]:
    """Train a cell's model and measure it: the record that a study keeps.

    "score" is the accuracy at asked positions, or the loss in nats per byte; "by_distance" the accuracy by the number
    of tokens between a key and its query; "layers" the indices of the full layers. A training that diverges scores no
    accuracy, or the loss of the uniform guess, and says so in "diverged".
    """
    from tilewright.nn.hybrid_linear_attention.cost import flops_per_token, state_bytes
    from tilewright.train import TrainConfig, Trainer, TrainingError

    start = time.perf_counter()
    model = build(setting, cell)
    config = TrainConfig(
        setting.steps,
        cell.rate,
        warmup=setting.steps // 10,
        final_lr=0.0,
        weight_decay=setting.weight_decay,
        seed=cell.seed,
    )
    trainer = Trainer(model, _batches(setting, cell.seed), config, progress=False)
    try:
        losses = trainer.run().losses
        measured = _measure(setting, model.eval())
    except TrainingError as error:
        losses = [record["loss"] for record in trainer.records]
        measured = {"score": 0.0 if setting.higher_is_better else math.log(VOCABULARY), "diverged": str(error)}
    every = max(1, setting.steps // 20)
    names = model.config.layer_names
    return {
        **asdict(cell),
        "layers": [i for i, name in enumerate(names) if name == SOFTMAX],
        "curve": [sum(losses[i : i + every]) / len(losses[i : i + every]) for i in range(0, len(losses), every)],
        **measured,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": flops_per_token(model.config, setting.length),
        "state_bytes": state_bytes(model.config, setting.length),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _recall(setting: Setting, batch: int, seed: int, fewest: int | None = None) -> Stream:
    sizes: dict[str, Any] = {"length": setting.length, "pairs": setting.pairs, "vocabulary": setting.vocabulary}
    if setting.task == "mqar":
        return Stream(multi_query_recall, batch, seed, sizes)
    return Stream(key_value_recall, batch, seed, {**sizes, "fewest": fewest})


@lru_cache(maxsize=4)
def _text(name: str, part: str) -> Tensor:
    return byte_text(name, part)


def _batches(setting: Setting, seed: int) -> Callable[[int], Batch]:
    if setting.task == "lm":
        return ByteWindows(_text(setting.text, "calibration"), setting.batch, setting.length, seed)
    return _recall(setting, setting.batch, seed, FEWEST)


@torch.no_grad()
def _measure(setting: Setting, model: nn.Module) -> dict[str, Any]:
    """The score, and for recall the accuracy by distance in `BINS` bins of equal width."""
    from tilewright.train.losses import logits_of, mean_loss

    if setting.task == "lm":
        held_out = _text(setting.text, "evaluation")
        windows = held_out_windows(held_out, length=setting.length, batch=32, count=setting.evaluation)
        return {"score": mean_loss(model, windows)}
    stream = _recall(setting, 64, EVALUATION_SEED)
    right, asked = torch.zeros(BINS), torch.zeros(BINS)
    for step in range(-(-setting.evaluation // 64)):
        inputs, labels = stream(step)
        counted = labels != IGNORE
        hit = (logits_of(model, inputs).argmax(-1) == labels)[counted].float()
        place = BINS * distances(_keys(setting, inputs))[counted] // setting.length
        right.index_add_(0, place, hit)
        asked.index_add_(0, place, torch.ones_like(hit))
    shares = {int((i + 0.5) * setting.length / BINS): float(right[i] / asked[i]) for i in range(BINS) if asked[i] > 0}
    return {"score": float(right.sum() / asked.sum()), "by_distance": shares}


def _keys(setting: Setting, inputs: Tensor) -> Tensor:
    """Tokens by the key that they hold: a pair's token and its query's become one."""
    if setting.task == "mqar":
        return inputs
    keys = keys_of(setting.vocabulary)
    return torch.where(inputs > keys, 1 + (inputs - 1 - keys) // ANSWERS, inputs)


def distances(inputs: Tensor) -> Tensor:
    """Tokens between each position and the first one that holds the same token: int64 [B, T]."""
    same = inputs[:, :, None] == inputs[:, None, :]
    return torch.arange(inputs.shape[1]) - same.int().argmax(-1)
