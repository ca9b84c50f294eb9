# SPDX-License-Identifier: Apache-2.0
"""What steering does: how far source texts still are from target texts, and how a probe sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.steer.activations import Collector, encode
from tilewright.steer.lineas.loss import distributional_losses
from tilewright.steer.steering import Steering


class Evaluation:
    """A model and two sides of texts to judge a steering by; texts that it was not fitted to.

    Args:
        steering: any with the same places and pooling as those to be judged.
        probe: texts of both sides that the probe is trained on; None: every second of ``source`` and ``target``, the
            others are then scored.
        modules: activation that the probe reads; None: the last norm of the model, else its last steered place.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        steering: Steering,
        source: Sequence[str],
        target: Sequence[str],
        *,
        probe: tuple[Sequence[str], Sequence[str]] | None = None,
        at: str | None = None,
    ) -> None:
        self.model, self.steering = model, steering
        self.names = list(steering.maps)
        self.pooling: Any = steering.settings.get("pooling", "mean")
        if probe is None:
            probe, source, target = (source[::2], target[::2]), source[1::2], target[1::2]
        self.source, self.unsteered = encode(source, tokenizer, "source"), encode(target, tokenizer, "target")
        last = [name for name, part in model.named_modules() if "norm" in type(part).__name__.lower()]
        self.at = at or (last[-1] if last else self.names[-1])
        self.target = self._pooled(self.unsteered, self.names)
        self._fit_probe(*(self._pooled(encode(side, tokenizer, "probe"), [self.at])[self.at] for side in probe))

    def _pooled(self, batch: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        with torch.no_grad(), Collector(self.model, names, self.pooling) as run:
            return run(batch)

    def _fit_probe(self, source: Tensor, target: Tensor) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        labels = [0] * len(source) + [1] * len(target)
        self._probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        self._probe.fit(torch.cat([source, target]).double().cpu().numpy(), labels)

    def steered(self, steering: Steering, strength: float) -> tuple[float, float]:
        """(sum over places of the squared distances to the target, the probe's mean probability of the target)."""
        from contextlib import ExitStack

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(steering.transform(self.model, strength))
            # Hooks run in the order in which they were placed: these see mapped activations.
            names = [*self.names, *([self.at] if self.at not in self.names else [])]
            seen = stack.enter_context(Collector(self.model, names, self.pooling))(self.source)
        losses = distributional_losses({name: seen[name] for name in self.names}, self.target)
        chances = self._probe.predict_proba(seen[self.at].double().cpu().numpy())[:, 1]
        return float(sum(losses.values())), float(chances.mean())

    def loss(self, strength: float) -> float:
        """Sum over places of the squared Wasserstein distances to the target's activations."""
        return self.steered(self.steering, strength)[0]

    def score(self, strength: float) -> float:
        """The probe's mean probability that a steered source text is a target text."""
        return self.steered(self.steering, strength)[1]
