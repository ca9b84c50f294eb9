# SPDX-License-Identifier: Apache-2.0
"""One model on one text: the dense pass (losses, sampled activations), and passes with neurons dropped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright._methods import choose
from tilewright._progress import track
from tilewright.capture import Batch, Site, Transform, intervened, tapped
from tilewright.capture.stream import NO_BATCHES, TokenShape
from tilewright.data.recall import IGNORE
from tilewright.reducers import Reservoir
from tilewright.sparsify.sparsing_law.cett import TailError
from tilewright.sparsify.sparsing_law.criteria import Cats, Cett, Criterion, Fat, Rule, TopK, Zero
from tilewright.sparsify.sparsing_law.neurons import FeedForward, feed_forwards, output_weight
from tilewright.train.losses import evaluating

# Tokens whose activations are kept for finding thresholds: 4 bytes x m x layers each.
SAMPLE_ROWS = 2048
_ROWS = 256
KINDS: dict[str, Any] = {"zero": Zero, "fat": Fat, "topk": TopK, "cats": Cats, "cett": Cett}
METRICS = tuple(KINDS)

Act = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Pass:
    """The model over the text with neurons dropped.

    losses: float64 [n], of each scored token. counts: int64 [m] by layer, how many tokens had the neuron active.
    token_ratio: float64 [tokens], the share of neurons active for each token, mean over layers.
    """

    losses: Tensor
    counts: dict[str, Tensor]
    token_ratio: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that were seen, padding left out."""
        return len(self.token_ratio)

    @property
    def per_layer(self) -> dict[str, float]:
        """Activation ratio of each layer, mean over tokens."""
        return {name: float(count.double().mean()) / self.tokens for name, count in self.counts.items()}

    @property
    def ratio(self) -> float:
        """Activation ratio, mean over tokens and layers."""
        return sum(self.per_layer.values()) / len(self.counts)


class Measurement:
    """A model on a text. Whatever is asked of one Measurement shares its dense pass, and every pass made before.

    model: a module whose output has ``.logits`` [B, T, V], or is that tensor; it runs in evaluation mode.
    data: token tensors [B, T], or mappings with ``input_ids``, ``attention_mask``, and ``labels`` where other tokens
        than the inputs are scored (-100: none). It is kept as a list.
    calibration: batches whose activations give the thresholds; ``data`` when None.
    layers: the blocks, see :func:`tilewright.sparsify.sparsing_law.feed_forwards`.
    sample_rows: tokens, drawn uniformly by ``seed``, whose activations are kept in memory to find thresholds.

    Raises:
        ValueError: the batches are empty or score no token, a loss or an activation is NaN or infinite, or the model
            has no feed-forward block that fits.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Batch],
        *,
        calibration: Iterable[Batch] | None = None,
        layers: Iterable[str | FeedForward] | None = None,
        sample_rows: int = SAMPLE_ROWS,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        self.model, self.blocks, self.progress = model, feed_forwards(model, layers), progress
        self.batches = list(data)
        self._calibration = None if calibration is None else list(calibration)
        if not self.batches or self._calibration == []:
            raise ValueError(NO_BATCHES)
        self._rows, self._seed = sample_rows, seed
        self._samples: dict[str, dict[str, Tensor]] = {}
        self._criteria: dict[tuple[str, str], Criterion] = {}
        self._passes: dict[tuple[str, float, str], Pass] = {}
        if self._calibration is None:
            self.dense = self._observe("hidden", self.batches, "dense pass")
        else:
            self._observe("hidden", self._calibration, "calibrating")
            self.dense = self._score(self.batches, "dense pass", TokenShape())

    def criterion(self, metric: str, scope: str = "token") -> Criterion:
        """A metric on this model: zero, fat, topk (``scope``: per token, or "global"), cats, cett.

        Raises:
            ValueError: there is no such metric, or it needs the gate's activation and no module gives it.
        """
        kind = choose(KINDS, metric, "metric")
        key = (metric, scope)
        if key not in self._criteria:
            if kind is Cett:
                self._criteria[key] = Cett(self.blocks, self._tail_errors())
            else:
                options = {"scope": scope} if kind is TopK else {}
                self._criteria[key] = kind(self.blocks, self._sample("gate"), **options)
        return self._criteria[key]

    def run(self, metric: str, arg: float, scope: str = "token") -> Pass:
        """The text with the neurons dropped that a metric calls inactive at ``arg``."""
        key = (metric, arg, scope)
        if key not in self._passes:
            self._passes[key] = self.run_rules(self.criterion(metric, scope).rules(arg), f"{metric} {arg:.4g}")
        return self._passes[key]

    def run_rules(self, rules: Mapping[str, Rule], description: str = "sparse pass") -> Pass:
        """The text under rules of one's own, by layer."""
        shape = TokenShape()
        counts: dict[str, Tensor] = {}
        shares: list[Tensor] = []

        def thinned(name: str, rule: Rule) -> Transform:
            def change(x: Tensor) -> Tensor:
                drop = rule.drop(x)
                kept = shape.rows(name, ~drop)
                counts[name] = counts.get(name, 0) + kept.sum(0)
                shares.append(kept.double().mean(-1).cpu())
                return x.masked_fill(drop, 0)

            return change

        found: list[Tensor] = []

        def scored() -> Iterator[Batch]:
            for batch in self.batches:
                yield batch
                found.append(torch.stack(shares).mean(0))
                shares.clear()

        maps: dict[str | Site, Transform] = {exact_site(rule.site): thinned(name, rule) for name, rule in rules.items()}
        with intervened(self.model, maps):
            losses = self._score(scored(), description, shape, len(self.batches))
        return Pass(losses, {name: count.cpu() for name, count in counts.items()}, torch.cat(found))

    @property
    def silent(self) -> int:
        """Sampled tokens whose output is (nearly) zero in some layer, summed over layers; they have no tail error."""
        found = self.criterion("cett")
        assert isinstance(found, Cett)
        return sum(one.rows_skipped for one in found.errors.values())

    def _tail_errors(self) -> dict[str, TailError]:
        rows = self._sample("hidden")
        return {
            block.name: TailError(rows[block.name], output_weight(self.model, block).to(rows[block.name]), block.name)
            for block in self.blocks
        }

    def _sample(self, kind: str) -> dict[str, Tensor]:
        if kind not in self._samples:
            if not any(block.gated for block in self.blocks):
                return self._sample("hidden")
            self._observe(kind, self._calibration or self.batches, "calibrating")
        return self._samples[kind]

    def _observe(self, kind: str, batches: list[Batch], description: str) -> Tensor:
        """Losses of a dense pass whose activations are sampled: h ("hidden") or s ("gate")."""
        shape = TokenShape()
        reservoirs = {block.name: Reservoir(self._rows, self._seed) for block in self.blocks}
        taps: dict[str | Site, Callable[[str, Tensor], None]] = {}
        for block in self.blocks:
            site, act = block.gate_site if kind == "gate" else (f"{block.down}@input", None)
            taps[exact_site(site)] = _sampling(reservoirs[block.name], shape, act)
        with tapped(self.model, taps):
            losses = self._score(batches, description, shape)
        self._samples[kind] = {name: one.result() for name, one in reservoirs.items()}
        return losses

    def _score(self, batches: Iterable[Batch], description: str, shape: TokenShape, total: int | None = None) -> Tensor:
        losses = []
        with torch.no_grad(), evaluating(self.model):
            for batch in track(batches, description, show=self.progress, total=total):
                shape.take(batch)
                losses.append(token_losses(self.model, batch))
        found = torch.cat(losses)
        if not len(found):
            raise ValueError("the batches score no token; sequences of at least two tokens are needed")
        if not bool(torch.isfinite(found).all()):
            raise ValueError("the model's loss is NaN or infinite; the model or its input is damaged")
        return found


def _sampling(reservoir: Reservoir, shape: TokenShape, act: Act) -> Callable[[str, Tensor], None]:
    def tap(name: str, x: Tensor) -> None:
        rows = shape.rows(name, x.detach())
        reservoir.update(rows if act is None else act(rows))

    return tap


def exact_site(site: str) -> Site:
    """The site of one module by its full name, whatever characters that holds."""
    name, _, side = site.rpartition("@")
    return Site(f"re:{re.escape(name)}", side)


@contextmanager
def dropped(model: nn.Module, rules: Mapping[str, Rule]) -> Iterator[None]:
    """While the context lives, the model computes without the neurons that the rules drop."""

    def change(rule: Rule) -> Transform:
        return lambda x: x.masked_fill(rule.drop(x), 0)

    maps: dict[str | Site, Transform] = {exact_site(rule.site): change(rule) for rule in rules.values()}
    with intervened(model, maps):
        yield


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of each scored token, float64 [n], from float32 logits; padding is not scored.

    Raises:
        ValueError: the batch has no token ids, or the logits do not fit them.
    """
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    labels = given.pop("labels", given.get("input_ids"))
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        raise ValueError("a batch needs token ids [B, T] (a tensor, or the key 'input_ids'), or 'labels' of that shape")
    out: Any = model(**given) if isinstance(batch, Mapping) else model(batch)
    logits: Tensor = getattr(out, "logits", out)
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"the model gives logits {list(logits.shape)} for tokens {list(labels.shape)}; [B, T, V] needed"
        )
    scored = labels[:, 1:] != IGNORE
    mask = given.get("attention_mask")
    if mask is not None:
        real = mask.bool()
        scored = scored & real[:, 1:] & real[:, :-1]
    pieces = []
    for places in scored.nonzero().split(_ROWS):
        row, column = places.unbind(1)
        rows = logits[row.to(logits.device), column.to(logits.device)]
        targets = labels[row, column + 1].to(logits.device)
        pieces.append(F.cross_entropy(rows.float(), targets, reduction="none").double().cpu())
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)
