# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 for the dark-matter claim: activations of layer 16 on a disk, SAEs trained on them, the rest of the model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tilewright import data, evaluate, models
from tilewright.capture import record
from tilewright.inspect.sae import SAE, Rows, SAEConfig, SAETrainer
from tilewright.inspect.sae_dark_matter.analysis import SAEErrorAnalysis

LAYER = 15
SITE = f"model.layers.{LAYER}"
COMPONENTS = {
    "previous residual": f"model.layers.{LAYER - 1}",
    "attention output": f"{SITE}.self_attn",
    "MLP output": f"{SITE}.mlp",
}
CORPORA = ("speeches", "moby-dick")
LENGTH, SKIP = 256, 20


class Bench:
    """The model in float32 and contexts of two texts: to train on, to fit B, to evaluate; no text is in two of them.

    contexts: how many of each. store: activations of all of them, on the disk.
    """

    def __init__(self, quick: bool, folder: Path) -> None:
        self.quick = quick
        self.contexts = {"train": 32, "fit": 14, "test": 10} if quick else {"train": 96, "fit": 32, "test": 32}
        language = models.load(data.smollm2_gguf())
        self.module: Any = models.to_transformers(language, dequantize=True)
        self.batches = self._batches(language.tokenizer)
        sites = [SITE] if quick else [SITE, *COMPONENTS.values()]
        with self.layers(slice(LAYER + 1)) as early:
            inner = [site.removeprefix("model.") for site in sites]
            self.stores = {part: record(early, ids, inner, folder / part) for part, ids in self.batches.items()}

    def _batches(self, tokenizer: Any) -> dict[str, list[Tensor]]:
        """Contexts of both texts in turn: from the calibration parts to train on, the others from what is held out."""
        held_out = self.contexts["fit"] + self.contexts["test"]
        pieces = {}
        for part, count in (("calibration", self.contexts["train"]), ("evaluation", held_out)):
            texts = [
                evaluate.token_batches(evaluate.text_corpus(tokenizer, name, part), length=LENGTH, count=count // 2)
                for name in CORPORA
            ]
            pieces[part] = [context for pair in zip(*texts, strict=True) for context in pair]
        late = pieces["evaluation"]
        return {
            "train": pieces["calibration"],
            "fit": late[: self.contexts["fit"]],
            "test": late[self.contexts["fit"] :],
        }

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

    def train(self, width: int, seed: int = 0, *, rows: Rows | None = None, **changed: Any) -> SAE:
        """A TopK SAE by the claim's recipe."""
        settings: dict[str, Any] = {
            "steps": 250 if self.quick else 600,
            "batch": 512,
            "lr": 1e-3,
            "normalize": "center",
        }
        config = SAEConfig(width=width, k=32, seed=seed, **{**settings, **changed})
        return SAETrainer(config).fit(self.rows("train") if rows is None else rows, progress=False)

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

    @cached_property
    def token_ids(self) -> tuple[Tensor, Tensor]:
        one, other = (self.rows(part).tokens for part in ("fit", "test"))
        assert one is not None
        assert other is not None
        return one[:, 2], other[:, 2]


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
