# SPDX-License-Identifier: Apache-2.0
"""Sparsing Law's claim on training: small byte models with ReLU and SiLU gates, measured along the way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tilewright.claims import Experiment, Row, at_least, at_most, spread
from tilewright.data.bytes import ByteWindows, byte_text, held_out_windows
from tilewright.sparsify.sparsing_law.laws import fit_activation_law
from tilewright.sparsify.sparsing_law.measurement import Measurement
from tilewright.sparsify.sparsing_law.method import joint_cett_ppl, sparsity
from tilewright.train import TrainConfig, Trainer, mean_loss

CORPORA = ("speeches", "moby-dick")
JOINT = 5


@dataclass(frozen=True)
class Setting:
    """Sizes of a model and its training."""

    layers: int
    width: int
    neurons: int
    steps: int
    every: int
    batch: int
    length: int
    seeds: int
    windows: int
    lr: float = 3e-3


FULL = Setting(layers=4, width=128, neurons=320, steps=240, every=16, batch=16, length=128, seeds=2, windows=24)
QUICK = Setting(layers=2, width=64, neurons=160, steps=96, every=12, batch=8, length=64, seeds=1, windows=16)


def language_model(activation: str, setting: Setting, seed: int) -> nn.Module:
    """A Llama-like byte model; the two activations start from the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=setting.width,
            intermediate_size=setting.neurons,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.width // 32,
            max_position_embeddings=setting.length,
            hidden_act=activation,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


@dataclass(frozen=True)
class Checkpoint:
    """Weights after ``tokens`` bytes, and their loss on held-out text."""

    tokens: int
    state: dict[str, Tensor]
    loss: float


def trained(activation: str, setting: Setting, seed: int) -> list[Checkpoint]:
    """Checkpoints along a run at a constant rate after its warm-up (the stable phase of the paper's schedule)."""
    model = language_model(activation, setting, seed)
    text = torch.cat([byte_text(name, "calibration") for name in CORPORA])
    held_out = held_out_windows(held_out_text(), length=setting.length, batch=16, count=setting.windows)
    kept: list[Checkpoint] = []

    def keep(model: nn.Module) -> float:
        loss = mean_loss(model, held_out)
        tokens = (len(kept) + 1) * setting.every * setting.batch * setting.length
        kept.append(Checkpoint(tokens, {name: value.clone() for name, value in model.state_dict().items()}, loss))
        return loss

    config = TrainConfig(
        setting.steps, lr=setting.lr, schedule="constant", warmup=setting.every, seed=seed, evaluate_every=setting.every
    )
    Trainer(
        model,
        ByteWindows(text, setting.batch, setting.length, seed),
        config,
        evaluate=keep,
        progress=False,
    ).run()
    return kept[1:]  # the first ends with the warm-up


def held_out_text() -> Tensor:
    """Bytes that no model was trained on: both texts in turn, so that any beginning holds some of each."""
    texts = [byte_text(name, "evaluation").split(2048) for name in CORPORA]
    return torch.cat([piece for pair in zip(*texts, strict=False) for piece in pair])


def measured(activation: str, setting: Setting, checkpoints: list[Checkpoint]) -> list[dict[str, Any]]:
    """The joint protocol: one tail error from the last five checkpoints, all measured with it."""
    windows = held_out_windows(held_out_text(), length=setting.length, batch=16, count=setting.windows)
    batches = [inputs for inputs, _ in windows]
    models = []
    for checkpoint in checkpoints:
        model = language_model(activation, setting, 0)
        model.load_state_dict(checkpoint.state)
        models.append(Measurement(model, batches, progress=False))
    joint = joint_cett_ppl(models[-JOINT:])
    found = []
    for checkpoint, measurement in zip(checkpoints, models, strict=True):
        report = sparsity(measurement, metric="cett", arg=joint.cett)
        found.append(
            {
                "tokens": checkpoint.tokens,
                "loss": checkpoint.loss,
                "activation_ratio": report.activation_ratio,
                "ppl_ratio": report.ppl_ratio,
                "stderr": report.stderr,
                "cett": joint.cett,
                "nonzero": sparsity(measurement, metric="zero").activation_ratio,
            }
        )
    return found


def one_run(which: tuple[str, int], setting: Setting) -> list[dict[str, Any]]:
    """Train a model and measure it along the way; which: activation and seed."""
    activation, seed = which
    return measured(activation, setting, trained(activation, setting, seed))


def trend_rows(experiment: Experiment) -> Iterator[Row]:
    """Item 4: ReLU below SiLU and falling, SiLU not falling, losses alike."""
    setting = QUICK if experiment.quick else FULL
    experiment.say(f"training with ReLU and SiLU, {setting.seeds} seed(s) each")
    pairs = list(itertools.product(("relu", "silu"), range(setting.seeds)))
    found = spread(partial(one_run, setting=setting), pairs)
    runs = {
        activation: [f for (a, _), f in zip(pairs, found, strict=True) if a == activation] for activation, _ in pairs
    }
    experiment.values["training"] = runs
    late = {name: [points[len(points) // 2 :] for points in found] for name, found in runs.items()}
    gaps = [
        silu["activation_ratio"] - relu["activation_ratio"]
        for pair in zip(late["relu"], late["silu"], strict=True)
        for relu, silu in zip(*pair, strict=True)
    ]
    losses = [
        abs(relu[-1]["loss"] / silu[-1]["loss"] - 1) for relu, silu in zip(late["relu"], late["silu"], strict=True)
    ]
    slopes = {name: [slope(points) for points in found] for name, found in late.items()}
    yield experiment.in_full(
        at_least("active neurons, SiLU minus ReLU, smallest of the later half of training", min(gaps), 0.1)
    )
    steepest = max(value for value, _ in slopes["relu"])
    name = "ReLU: active neurons a doubling of the training, later half, largest of seeds"
    yield experiment.in_full(Row(name, "falls", steepest, "< 0", steepest < 0))
    margin = min(value + 2 * error for value, error in slopes["silu"])
    name = "SiLU: the same plus two standard errors, smallest of seeds"
    yield experiment.in_full(at_least(name, margin, 0.0, paper="rises"))
    yield experiment.in_full(
        at_most("held-out loss, ReLU against SiLU, largest relative difference", max(losses), 0.03)
    )
    last = [points[-1] for points in late["relu"]]
    cut = min(1 - point["activation_ratio"] / point["nonzero"] for point in last)
    name = "ReLU: active neurons at +1 % perplexity below those that are not zero, relative"
    yield Row(name, "61 % (0.8B)", f"{100 * cut:.0f} %", "reported", True)
    yield from law_rows(experiment, runs)


def law_rows(experiment: Experiment, runs: dict[str, list[list[dict[str, Any]]]]) -> Iterator[Row]:
    """Laws fitted to these runs, reported: minutes of training do not determine a limit."""
    for activation, name in (("relu", "ReLU"), ("silu", "SiLU")):
        points = runs[activation][0]
        if len(points) < 8:
            continue
        counts, ratios = ([float(point[key]) for point in points] for key in ("tokens", "activation_ratio"))
        law = fit_activation_law(counts, ratios, unit=1e6, bootstrap=100)
        experiment.values[f"law {activation}"] = law.to_dict()
        low, high = law.ci()
        text = f"{law.kind} law, limit {100 * law.limit:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        yield Row(f"{name}, first seed: form chosen and limit of active neurons", "", text, "reported", True)


def slope(points: list[dict[str, Any]]) -> tuple[float, float]:
    """Change of the activation ratio a doubling of the tokens, and its standard error."""
    x = np.array([math.log2(point["tokens"]) for point in points])
    y = np.array([point["activation_ratio"] for point in points])
    x = x - x.mean()
    found = float(x @ y / (x @ x))
    left = y - y.mean() - found * x
    return found, float(np.sqrt(left @ left / max(len(x) - 2, 1) / (x @ x)))
