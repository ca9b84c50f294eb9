# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 for CATS's claim: texts, scores from two calibration texts, perplexity with some neurons dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright import data, evaluate, models
from tilewright.capture import stream
from tilewright.sparsify.cats.baselines import Criterion, sparsified, thresholded
from tilewright.sparsify.cats.calibrate import Ranking, Scores, collect_scores
from tilewright.sparsify.mlps import GatedMLP, gated_mlps


class Bench:
    """The model in float32, two disjoint calibration texts, and a held-out one."""

    def __init__(self, quick: bool) -> None:
        self.model = models.load(data.smollm2_gguf())
        self.module: Any = models.to_transformers(self.model, dequantize=True)
        self.window, self.tokens, self.calibration_tokens = (256, 512, 512) if quick else (512, 1536, 2048)
        tokenizer = self.model.tokenizer
        self.text = evaluate.text_corpus(tokenizer, "speeches", "evaluation", max_tokens=self.tokens)
        count = 2 * self.calibration_tokens
        calibration = evaluate.text_corpus(tokenizer, "speeches", "calibration", max_tokens=count)
        pieces = calibration.split(self.calibration_tokens)
        self.batches = [evaluate.token_batches(piece, length=self.window) for piece in pieces]
        self.training = evaluate.text_corpus(tokenizer, "speeches", "calibration")[count:]
        self.mlps: dict[str, GatedMLP] = gated_mlps(self.module)

    def scores(self, ranking: Ranking = "activation", which: int = 0, method: Any = "exact") -> Scores:
        """Scores of one calibration text."""
        return collect_scores(self.module, self.batches[which], ranking=ranking, method=method)

    def perplexity(self, module: Any = None) -> float:
        """On the held-out text."""
        return evaluate.perplexity(module or self.module, self.text, window=self.window).perplexity

    def dropped(self, keep: Criterion, act: str | None = None) -> tuple[float, float]:
        """(perplexity on the held-out text, mean sparsity there)."""
        with sparsified(self.module, keep, act=act) as kept:
            return self.perplexity(), kept.mean()

    def dropped_by(self, scores: Scores, sparsity: float, everywhere: bool = False) -> tuple[float, float]:
        """:meth:`dropped` by thresholds a layer, or by one for the model."""
        made = scores.global_threshold(sparsity) if everywhere else scores.thresholds(sparsity)
        return self.dropped(thresholded(made))

    def inputs(self, layers: list[int]) -> dict[str, Tensor]:
        """Inputs x [T, D] of some MLPs on the beginning of the held-out text, by MLP."""
        names = [list(self.mlps)[layer] for layer in layers]
        sites = [self.mlps[name].site("gate", "input") for name in names]
        rows = next(stream(self.module, [self.text[None, :64]], sites))
        return dict(zip(names, rows.values(), strict=True))


def oracle(x: Tensor, threshold: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(y, |a|, what |a| may be off by when computed in float32), all float64: the dense MLP with a mask."""
    gate, up, down_t = (w.double() for w in weights)
    x = x.double()
    z = x @ gate.T
    a = torch.nn.functional.silu(z)
    kept = ~(a.abs() < threshold.double())
    y = torch.where(kept, a * (x @ up.T), 0.0) @ down_t
    # (K/32 + 6) roundings of a dot product, the slope of SiLU below 1.1, and of SiLU itself 6.
    off = (x.shape[-1] / 32 + 6) * 2**-24 * (x.abs() @ gate.abs().T) * 1.1 + 6 * 2**-24 * a.abs()
    return y, a.abs(), off
