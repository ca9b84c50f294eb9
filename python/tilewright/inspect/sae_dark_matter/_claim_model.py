# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 for the dark-matter claim: activations of layer 16 on a disk, SAEs trained on them, the rest of the model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilewright import data, evaluate, models
from tilewright.capture import ActivationStore, record
from tilewright.claims import call_with, spread
from tilewright.inspect.sae import SAE, Rows, SAEConfig, SAETrainer
from tilewright.inspect.sae_dark_matter.analysis import SAEErrorAnalysis
from tilewright.inspect.sae_dark_matter.downstream import DownstreamLoss, downstream_loss
from tilewright.inspect.sae_dark_matter.least_squares import LinearMap

LAYER = 15
SITE = f"model.layers.{LAYER}"
COMPONENTS = {
    "previous residual": f"model.layers.{LAYER - 1}",
    "attention output": f"{SITE}.self_attn",
    "MLP output": f"{SITE}.mlp",
}
LENGTH, SKIP = 256, 20
QUICK = {"train": {"speeches": 16, "moby-dick": 16}, "fit": {"speeches": 7, "moby-dick": 7},
         "test": {"speeches": 5, "moby-dick": 5}}  # fmt: skip
FULL = {part: {"speeches": both, "moby-dick": both, "encyclopedia": more}
        for part, both, more in (("train", 48, 160), ("fit", 11, 12), ("test", 11, 12))}  # fmt: skip
"""Contexts of each text by part: an SAE that sees the same few again and again learns them by heart."""


class Bench:
    """The model in float32 and contexts of some texts: to train on, to fit B, to evaluate; none is in two of them.

    stores: activations of all of them, in ``folder``; those that another process has recorded there are opened.
    """

    def __init__(self, quick: bool, folder: Path) -> None:
        self.quick, self.folder = quick, folder
        self.contexts = QUICK if quick else FULL
        language = models.load(data.smollm2_gguf())
        self.module: Any = models.to_transformers(language, dequantize=True)
        self.batches = self._batches(language.tokenizer)
        sites = [SITE] if quick else [SITE, *COMPONENTS.values()]
        inner = [site.removeprefix("model.") for site in sites]
        with self.layers(slice(LAYER + 1)) as early:
            for part, ids in self.batches.items():
                if not (folder / part).exists():
                    record(early, ids, inner, folder / part)
        self.stores = {part: ActivationStore(folder / part) for part in self.batches}

    def _batches(self, tokenizer: Any) -> dict[str, list[Tensor]]:
        """Contexts of all texts in turn: from the calibration parts to train on, the others from what is held out."""
        found = {}
        begin: dict[str, int] = {}
        for part, counts in self.contexts.items():
            texts = []
            for name, count in counts.items():
                half = "calibration" if part == "train" else "evaluation"
                start = 0 if part == "train" else begin.get(name, 0)
                begin[name] = 0 if part == "train" else start + count
                ids = evaluate.text_corpus(tokenizer, name, half, max_tokens=(start + count) * LENGTH)
                texts.append(evaluate.token_batches(ids, length=LENGTH)[start : start + count])
            found[part] = _in_turn(texts)
        return found

    @contextlib.contextmanager
    def layers(self, part: slice) -> Iterator[Any]:
        """While the context lives, the model has only these of its layers."""
        whole = self.module.model.layers
        self.module.model.layers = whole[part]
        try:
            yield self.module.model if part.start is None else self.module
        finally:
            self.module.model.layers = whole

    def rows(self, part: str, site: str = SITE) -> Rows:
        """Recorded rows at positions >= SKIP."""
        return Rows(self.stores[part], point(site), skip=SKIP)

    def train(self, cases: Sequence[Case]) -> list[SAE]:
        """TopK SAEs by the claim's recipe."""
        return spread(partial(trained, folder=self.folder, quick=self.quick), cases)

    def analysis(self, sae: SAE, site: str = SITE) -> SAEErrorAnalysis:
        """Fitted on the contexts of "fit", measured on those of "test"."""
        return SAEErrorAnalysis(sae, self.rows("fit", site), self.rows("test", site))

    @contextlib.contextmanager
    def late(self, part: str, count: int | None = None) -> Iterator[tuple[Late, list[Tensor]]]:
        """(the rest of the model behind the site, token ids of its contexts): activations come from the store."""
        with self.layers(slice(LAYER + 1, None)) as module:
            batches = self.batches[part][:count]
            x = self.stores[part][point(SITE)].view(-1, LENGTH, self.rows(part).width)
            yield Late(module, {key(ids): some for ids, some in zip(batches, x, strict=False)}), batches

    def losses(self, part: str) -> Tensor:
        """Loss on each token that has a place in :meth:`rows`, predicted from those before it: [n]."""
        found = []
        with self.late(part) as (module, batches), torch.no_grad():
            for ids in batches:
                logits = module(ids)[0, SKIP - 1 : -1]
                found.append(nn.functional.cross_entropy(logits, ids[0, SKIP:], reduction="none"))
        return torch.cat(found)

    def downstream(self, sae: SAE, B: LinearMap, count: int | None = None) -> DownstreamLoss:
        """Loss with the site's activation replaced, on the first contexts to evaluate."""
        with self.late("test", count) as (module, batches):
            return downstream_loss(module, "entry", sae, B, batches, skip=SKIP, progress=False)

    def spread(self, works: Sequence[Callable[[Bench], Any]]) -> list[Any]:
        """work(bench) for all works, in processes with a model of their own."""
        return spread(call_with, works, partial(Bench, self.quick, self.folder), own=self)

    @cached_property
    def token_ids(self) -> tuple[Tensor, Tensor]:
        one, other = (self.rows(part).tokens for part in ("fit", "test"))
        assert one is not None
        assert other is not None
        return one[:, 2], other[:, 2]


@dataclass(frozen=True)
class Case:
    """An SAE to train: on a site's activations, or on what ``part`` makes of them; by default for the form's steps."""

    width: int
    seed: int = 0
    site: str = SITE
    steps: int | None = None
    part: Any = None


def trained(case: Case, folder: Path, quick: bool) -> SAE:
    """A TopK SAE on the activations recorded to train on."""
    rows = Rows(ActivationStore(folder / "train"), point(case.site), skip=SKIP, transform=case.part)
    steps = case.steps or (250 if quick else 600)
    config = SAEConfig(width=case.width, k=32, seed=case.seed, steps=steps, batch=512, lr=1e-3, normalize="center")
    return SAETrainer(config).fit(rows, progress=False)


def _in_turn(texts: list[list[Tensor]]) -> list[Tensor]:
    """Contexts of several texts, evenly mixed, so that any beginning holds some of each."""
    places = [((i + 0.5) / len(some), context) for some in texts for i, context in enumerate(some)]
    return [context for _, context in sorted(places, key=lambda place: place[0])]


def point(site: str) -> str:
    """A site's name in the store: the recording ran the model without its head."""
    return f"{site.removeprefix('model.')}@output"


def key(ids: Tensor) -> bytes:
    return ids.numpy().tobytes()


class Late(nn.Module):
    """The model's later layers on recorded activations, which pass through ``entry``."""

    def __init__(self, module: Any, recorded: dict[bytes, Tensor]) -> None:
        super().__init__()
        self.entry = nn.Identity()
        self.module, self.recorded = module, recorded

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.stack([self.recorded[key(row[None])] for row in ids])
        return self.module(inputs_embeds=self.entry(x), use_cache=False).logits


@contextlib.contextmanager
def bench(quick: bool) -> Iterator[Bench]:
    """A bench with its activations in a folder that lives as long as the context."""
    with tempfile.TemporaryDirectory(prefix="tilewright-sae-") as folder:
        yield Bench(quick, Path(folder))
