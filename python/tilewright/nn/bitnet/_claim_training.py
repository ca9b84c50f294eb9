# SPDX-License-Identifier: Apache-2.0
"""Learning with ternary weights: beside the same model in float, and beside its weights rounded afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from tilewright.claims import Experiment, Row, at_least, at_most
from tilewright.data.bytes import ByteWindows, byte_text, held_out_windows
from tilewright.nn.bitnet.convert import replace_with_bitlinear
from tilewright.nn.bitnet.modeling import build_bitnet
from tilewright.train import TrainConfig, Trainer
from tilewright.train.ternary import bits_per_byte

FLOAT, TERNARY, AFTERWARDS = "float", "ternary, trained so", "float, rounded afterwards"
RATES = (2e-3, 6e-3)
LENGTH, BATCH = 128, 8


def rows(experiment: Experiment) -> Iterator[Row]:
    """Bits a byte on held-out text; each form with the better of two rates, chosen on the first seed."""
    seeds = (0,) if experiment.quick else (0, 1, 2)
    steps = 120 if experiment.quick else 600
    text = torch.cat([byte_text(name, "calibration") for name in ("moby-dick", "speeches")])
    held = torch.cat([byte_text(name, "evaluation", max_bytes=1 << 14) for name in ("moby-dick", "speeches")])
    score = bits_per_byte(held_out_windows(held, length=LENGTH, batch=32), torch.ones(256, dtype=torch.int64))
    found: dict[str, list[float]] = {FLOAT: [], TERNARY: [], AFTERWARDS: []}
    chosen: dict[bool, float] = {}
    for ternary in (False, True):
        trials = {}
        for rate in RATES:
            experiment.say(f"training, {'ternary' if ternary else 'float'}, rate {rate}")
            trials[rate] = trained(text, steps, rate, seeds[0], ternary)
        scores = {rate: score(model)["bits_per_byte"] for rate, model in trials.items()}
        chosen[ternary] = min(scores, key=lambda rate: scores[rate])
        models = [trials[chosen[ternary]]]
        for seed in seeds[1:]:
            experiment.say(f"training, {'ternary' if ternary else 'float'}, seed {seed}")
            models.append(trained(text, steps, chosen[ternary], seed, ternary))
        for model in models:
            found[TERNARY if ternary else FLOAT].append(score(model)["bits_per_byte"])
            if not ternary:
                found[AFTERWARDS].append(score(rounded(model))["bits_per_byte"])
    experiment.values["training"] = found
    experiment.values["rates"] = {name: chosen[name == TERNARY] for name in (FLOAT, TERNARY)}
    means = {name: sum(scores) / len(scores) for name, scores in found.items()}
    yield at_most(
        "bits a byte on held-out text, ternary over float",
        means[TERNARY] / means[FLOAT],
        1.10,
        paper="perplexity 12.87 over 12.33 at 0.7 billion weights, equal from 3 billion on",
    )
    gap = (means[AFTERWARDS] - means[FLOAT]) / max(abs(means[TERNARY] - means[FLOAT]), 1e-9)
    yield experiment.in_full(
        at_least("loss by rounding afterwards, over the loss by training ternary weights", gap, 3.0)
    )


def trained(text: torch.Tensor, steps: int, rate: float, seed: int, ternary: bool) -> Any:
    """A byte model of two layers, the same first weights and batches for both forms."""
    torch.manual_seed(seed)
    model = build_bitnet(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_layers=2, num_heads=3, num_kv_heads=1,
        max_position_embeddings=LENGTH, ternary=ternary,
    )  # fmt: skip
    config = TrainConfig(steps, lr=rate, schedule="wsd", final_lr=0.0, decay=0.3, warmup=min(30, steps), seed=seed)
    Trainer(model, ByteWindows(text, BATCH, LENGTH, seed), config, progress=False).run()
    return model.eval()


def rounded(model: Any) -> Any:
    """A copy of a float model with ternary linears, as if it had been trained so."""
    other = copy.deepcopy(model)
    replace_with_bitlinear(other)
    return other
