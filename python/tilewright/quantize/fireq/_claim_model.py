# SPDX-License-Identifier: Apache-2.0
"""The model and text on which FireQ's claim is checked: loaded once, its weights exchanged and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tilewright import data, evaluate, models
from tilewright.capture import Reducer, Site, observe
from tilewright.quantize.fireq.channels import CONSUMERS
from tilewright.quantize.fireq.config import SITES
from tilewright.quantize.fireq.rope import KeyRange, calibrate_keys
from tilewright.quantize.simulate import Simulation, simulated
from tilewright.reducers import Reservoir


class Bench:
    """SmolLM2 in float32, two disjoint calibration texts, and perplexity on held-out text.

    corpora: names of the evaluation texts. layers: those looked at one by one.
    """

    def __init__(self, quick: bool) -> None:
        self.model = models.load(data.smollm2_gguf())
        self.config = self.model.config
        self.module = models.to_transformers(self.model, dequantize=True)
        self.weights: dict[str, Tensor] = {name: p.data for name, p in self.module.named_parameters()}
        self.window, count = 512, 2 if quick else 4
        self.corpora = ("speeches",) if quick else ("speeches", "moby-dick")
        self.layers = range(0, self.config.num_hidden_layers, 10 if quick else 1)
        tokenizer = self.model.tokenizer
        self.texts = {
            name: evaluate.text_corpus(tokenizer, name, "evaluation", max_tokens=self.window * count)
            for name in self.corpora
        }
        text = evaluate.text_corpus(tokenizer, "speeches", "calibration", max_tokens=8192)
        half = len(text) // 2
        batches = 2 if quick else 4
        self.calibration = [
            evaluate.token_batches(part, length=512, count=batches) for part in (text[:half], text[half:])
        ]

    @property
    def probe(self) -> Tensor:
        """Tokens [1, 128] for comparisons of logits."""
        return self.texts["speeches"][None, :128]

    def key_ranges(self) -> list[list[KeyRange]]:
        """The keys' range by layer, once from each calibration text."""
        return [calibrate_keys(self.module, self.config, batches) for batches in self.calibration]

    def site_inputs(self, rows: int = 128) -> dict[str, list[Tensor]]:
        """Sampled real inputs [rows, K] of every kind of linear, by channel-scaling site and layer."""
        names = {site: [f"model.layers.{i}.{CONSUMERS[site][0]}@input" for i in self.layers] for site in SITES}
        wanted: dict[str | Site, Callable[[], Reducer]] = {
            name: lambda: Reservoir(rows) for some in names.values() for name in some
        }
        seen = observe(self.module, self.calibration[0][:1], wanted, description="sampling inputs")
        return {site: [seen[name] for name in some] for site, some in names.items()}

    def perplexity(
        self,
        corpus: str,
        what: Simulation | None = None,
        key_scales: list[Tensor] | None = None,
        *,
        max_tokens: int | None = None,
    ) -> float:
        """Perplexity on one corpus, with simulated roundings."""
        with simulated(self.module, what or Simulation(), key_scales):
            text = self.texts[corpus]
            return evaluate.perplexity(self.module, text, window=self.window, max_tokens=max_tokens).perplexity

    def logits(self, key_scales: list[Tensor] | None = None) -> Tensor:
        """Logits [1, 128, V] on the probe, nothing rounded."""
        with simulated(self.module, Simulation(), key_scales), torch.no_grad():
            out: Tensor = self.module(self.probe, use_cache=False).logits
        return out

    @contextlib.contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While the context lives, the module holds these weights (names not given stay)."""
        self._put(weights)
        try:
            yield
        finally:
            self._put(self.weights)

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            if name in weights:
                parameter.data = weights[name]
