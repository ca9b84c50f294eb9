# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 for CrossQuant's claim: perplexity with simulated activations, and of integer models made from it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tilewright import data, evaluate, models
from tilewright.capture import Site, Transform, intervened, tapped
from tilewright.quantize.crossquant.apply import Choose, LinearInput, apply_crossquant_, calibrate, crossquant_choice
from tilewright.quantize.crossquant.config import CrossQuantConfig
from tilewright.quantize.crossquant.linear import dequantize_weight, quantize_weight

LINEARS = r"re:model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj@input"
NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


class Bench:
    """The model in float32, its INT8-rounded weights, calibration texts and held-out text."""

    def __init__(self, quick: bool) -> None:
        model = models.load(data.smollm2_gguf())
        self.module: Any = models.to_transformers(model, dequantize=True)
        self.window, self.tokens = (256, 256) if quick else (512, 2048)
        self.text = evaluate.text_corpus(model.tokenizer, "speeches", "evaluation", max_tokens=self.tokens)
        count, sets = (1, 1) if quick else (3, 2)
        calibration = evaluate.text_corpus(
            model.tokenizer, "speeches", "calibration", max_tokens=sets * count * self.window
        )
        pieces = calibration.split(count * self.window)
        self.batches = [evaluate.token_batches(piece, length=self.window) for piece in pieces]
        self.linears = {
            name: part for name, part in self.module.named_modules()
            if isinstance(part, nn.Linear) and name != "lm_head"
        }  # fmt: skip

    def calibrate(self, which: int = 0, module: nn.Module | None = None) -> dict[str, LinearInput]:
        """Column maxima and samples from one calibration text."""
        return calibrate(module or self.module, self.batches[which])

    def perplexity(self, module: nn.Module | None = None, tokens: int | None = None) -> float:
        """Perplexity on the held-out text, or its beginning."""
        found = evaluate.perplexity(module or self.module, self.text, window=self.window, max_tokens=tokens)
        return found.perplexity

    def simulated(self, change: Transform, tokens: int | None = None, module: nn.Module | None = None) -> float:
        """Perplexity with the inputs of all linears changed."""
        with intervened(module or self.module, {LINEARS: change}):
            return self.perplexity(module, tokens)

    def integer(
        self,
        config: CrossQuantConfig,
        seen: dict[str, LinearInput],
        choose: Choose = crossquant_choice,
        *,
        module: nn.Module | None = None,
        tokens: int | None = None,
    ) -> float:
        """Perplexity of the deployed form: folded, weights rounded after that, integer products."""
        made = copy.deepcopy(module or self.module)
        apply_crossquant_(made, config, seen, choose=choose)
        return self.perplexity(made, tokens)

    @contextlib.contextmanager
    def rounded_weights(self, module: nn.Module | None = None) -> Iterator[None]:
        """While the context lives, all linears hold INT8-rounded weights, not folded."""
        found: Any = module or self.module
        linears = [found.get_submodule(name) for name in self.linears]
        before = [linear.weight.data for linear in linears]
        try:
            for linear in linears:
                linear.weight.data = dequantize_weight(*quantize_weight(linear.weight.data))
            yield
        finally:
            for linear, weight in zip(linears, before, strict=True):
                linear.weight.data = weight

    def mean_over_linears(
        self, measure: Callable[[str, Tensor], dict[str, float]], module: nn.Module | None = None
    ) -> dict[str, list[float]]:
        """``measure(module name, X [T, I])`` of all linears on the first window of the text, by quantity."""
        found: dict[str, list[float]] = {}

        def tap(name: str, x: Tensor) -> None:
            for key, value in measure(name.removesuffix("@input"), x.flatten(0, -2)).items():
                found.setdefault(key, []).append(value)

        taps: dict[str | Site, Callable[[str, Tensor], None]] = {LINEARS: tap}
        with torch.no_grad(), tapped(module or self.module, taps):
            (module or self.module)(self.text[None, : self.window])
        return found

    def planted(self, seed: int, channels: int = 4, factor: float = 64.0) -> Any:
        """The same function with outliers: random channels of each norm times ``factor``, consumers divided."""
        made = copy.deepcopy(self.module)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in made.model.layers:
                for norm, consumers in NORMS.items():
                    weight = getattr(layer, norm).weight
                    hard = torch.randperm(len(weight), generator=random)[:channels]
                    weight[hard] *= factor
                    for name in consumers:
                        layer.get_submodule(name).weight[:, hard] /= factor
        return made
