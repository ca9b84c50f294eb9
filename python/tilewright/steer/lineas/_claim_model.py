# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 for LinEAS's claim: methods fitted to shipped pairs of texts, judged on others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright import data, evaluate, models
from tilewright.ops.sorted_w2 import sorted_w2
from tilewright.reference.sorted_w2 import sorted_w2 as by_sorting
from tilewright.steer import steer
from tilewright.steer.activations import Collector, encode
from tilewright.steer.evaluation import Evaluation
from tilewright.steer.lineas.method import LinEASConfig, Training
from tilewright.steer.pairs import pair
from tilewright.steer.problem import Problem
from tilewright.steer.steering import Steering


@dataclass(frozen=True)
class Size:
    """How much a form of the claim does."""

    blocks: int
    texts: int
    held_out: int
    steps: int
    pairs: tuple[str, ...]
    seeds: tuple[int, ...]
    strengths: tuple[float, ...]
    neutral_tokens: int


QUICK = Size(8, 16, 16, 40, ("weather-animals",), (0, 1), (0.0, 0.5, 1.0), 128)
FULL = Size(
    12, 16, 32, 100, ("weather-animals", "present-past", "plain-exclamatory"), (0, 1), (0.0, 0.25, 0.5, 0.75, 1.0), 512
)


class Bench:
    """The model in float32, and what a form of the claim asks of it."""

    def __init__(self, quick: bool) -> None:
        self.size = QUICK if quick else FULL
        self.loaded = models.load(data.smollm2_gguf())
        self.tokenizer = self.loaded.tokenizer
        self.module: Any = models.to_transformers(self.loaded, dequantize=True)
        self.neutral = evaluate.text_corpus(
            self.tokenizer, "speeches", "evaluation", max_tokens=self.size.neutral_tokens
        )

    def fit(self, method: str, name: str, seed: int, **options: Any) -> Steering:
        """A method's maps from a pair's training texts, on the norms of the first blocks."""
        if method == "lineas":
            options = {"steps": self.size.steps, "optimizer": "adam", "lr": 0.01} | options
        source, target = pair(name, "train", self.size.texts, seed=seed)
        return steer(
            self.module,
            method,
            source=source,
            target=target,
            tokenizer=self.tokenizer,
            layers=range(self.size.blocks),
            progress=False,
            **options,
        )

    def evaluation(self, steering: Steering, name: str, seed: int) -> Evaluation:
        """Held-out texts of a pair, and a probe of the model's last norm trained on the training texts."""
        sides = pair(name, "held-out", self.size.held_out, seed=seed)
        return Evaluation(self.module, self.tokenizer, steering, *sides, probe=pair(name, "train", seed=seed))

    def perplexity(self, steering: Steering | None = None, strength: float = 0.0) -> float:
        """Of neutral text, with the model steered."""
        if steering is None:
            return evaluate.perplexity(self.module, self.neutral, window=128).perplexity
        with steering.transform(self.module, strength):
            return self.perplexity()

    def folding_errors(self, steering: Steering) -> tuple[float, bool]:
        """Largest difference of a logit of the folded model to the hooked one, over the largest logit; and whether
        strength 0 gives the model's own bits."""
        import copy

        ids = self.neutral[None, :32]
        folded = copy.deepcopy(self.module)
        steering.fold_(folded)
        with torch.no_grad():
            plain = self.module(ids).logits
            with steering.transform(self.module):
                hooked = self.module(ids).logits
            with steering.transform(self.module, 0.0):
                untouched = torch.equal(self.module(ids).logits, plain)
            error = float((folded(ids).logits - hooked).abs().max() / hooked.abs().max())
        return error, untouched

    def engine_agrees(self, steering: Steering, strength: float = 0.5, tokens: int = 24) -> tuple[int, int]:
        """Logits whose bits differ between the decode engine and the hooked low-bit transformers model on the same
        weights, and tokens that a greedy generation has in common."""
        from tilewright.models.engine import Engine

        model = models.load(data.smollm2_gguf())
        theirs: Any = models.to_transformers(model, kv_bits=16)
        steering.attach(model, strength)
        engine = Engine(model, 64, kv_bits=16)
        ids = self.tokenizer("The best thing about the weekend was", return_tensors="pt").input_ids
        with torch.no_grad(), steering.transform(theirs, strength):
            different = int((theirs(ids).logits[0] != engine.logits(ids[0].tolist())).sum())
            out = theirs.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
        ours = list(engine.generate(ids[0].tolist(), max_new_tokens=tokens, stop_tokens=()))
        common = sum(a == b for a, b in zip(out[0, ids.shape[1] :].tolist(), ours, strict=True))
        return different, common

    def step_times(self, repeats: int) -> dict[str, float]:
        """Seconds: of an optimiser step, of the bare forward and backward pass to the same place, of the loss alone
        with its gradient, and of the same by torch.sort."""
        source, target = pair("weather-animals", "train", 16)
        problem = Problem.of(self.module, source, target, self.tokenizer, layers=range(self.size.blocks))
        training = Training(problem, LinEASConfig(checkpoint=False))
        names = list(training.target)
        batch = encode(source, self.tokenizer, "source")
        embedding: Any = self.module.get_input_embeddings()

        def bare() -> None:
            # The embedding's output asks for a gradient, so that the backward pass goes through all blocks.
            handle = embedding.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_())
            with Collector(self.module, names[-1:], "mean") as run:
                run(batch)[names[-1]].sum().backward()
            handle.remove()

        z, v = (torch.cat(list(training.target.values()), 1) for _ in range(2))

        def cost(distance: Callable[[Tensor, Tensor], Tensor]) -> None:
            distance(z.clone().requires_grad_(), v).sum().backward()

        def step() -> None:
            # Maps are placed anew each time: the bare passes between must not run through them.
            with training.ready() as run:
                training.step(run, 999)

        losses = {"loss": lambda: cost(sorted_w2), "loss by torch.sort": lambda: cost(by_sorting)}
        return _fastest({"step": step, "bare": bare}, repeats) | _fastest(losses, repeats)


def _fastest(works: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of each, least of ``repeats`` rounds behind one that warms up. Taken in turn: other work on the machine
    slows all of them, not one."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: min(some[1:]) for name, some in times.items()}
