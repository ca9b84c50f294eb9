# SPDX-License-Identifier: Apache-2.0
"""What each part of the error costs the model: next-token loss with the activation replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright._progress import track
from tilewright.capture import Site, intervened
from tilewright.inspect.sae_dark_matter.analysis import apply_sae
from tilewright.inspect.sae_dark_matter.least_squares import LinearMap

SETTINGS = ("original", "sae", "sae+linear", "sae+nonlinear")


@dataclass(frozen=True)
class DownstreamLoss:
    """Mean next-token loss in nats by setting, and the share of the SAE's extra loss that adding a part takes back."""

    loss: dict[str, float]
    tokens: int

    @property
    def recovered(self) -> dict[str, float]:
        """(L_sae - L_setting) / (L_sae - L_original) for the linear and the nonlinear part."""
        lost = self.loss["sae"] - self.loss["original"]
        return {part: (self.loss["sae"] - self.loss[f"sae+{part}"]) / lost for part in ("linear", "nonlinear")}


@torch.no_grad()
def downstream_loss(
    model: nn.Module,
    site: str | Site,
    sae: Any,
    B: LinearMap,
    batches: Sequence[Tensor],
    *,
    skip: int = 0,
    progress: bool | None = None,
) -> DownstreamLoss:
    """Loss of a causal language model with the activation at ``site`` replaced at positions >= skip.

    By Sae(x), Sae(x) + LinearError(x), Sae(x) + NonlinearError(x), and not at all. Only tokens that are predicted at
    those positions count. batches: token ids [B, T]. B: ``SAEErrorAnalysis.B``.

    Raises:
        ValueError: a batch has no predicted token after ``skip``; the site matches nothing.
    """

    def recon(x: Tensor) -> Tensor:
        return apply_sae(sae, x)[0]

    maps: dict[str, Callable[[Tensor], Tensor] | None] = {
        "original": None,
        "sae": recon,
        "sae+linear": lambda x: recon(x) + B(x),
        "sae+nonlinear": lambda x: x - B(x),
    }
    totals = dict.fromkeys(maps, 0.0)
    count = 0
    for ids in track(batches, "downstream loss", show=progress):
        if ids.shape[1] <= skip + 1:
            raise ValueError(f"a batch has {ids.shape[1]} tokens; more than skip + 1 = {skip + 1} are needed")
        count += ids[:, skip + 1 :].numel()
        for name, change in maps.items():
            if change is None:
                totals[name] += _loss(model, ids, skip)
                continue
            with intervened(model, {site: _late(change, skip)}):
                totals[name] += _loss(model, ids, skip)
    if count == 0:
        raise ValueError("batches is empty; at least one batch of token ids is needed")
    return DownstreamLoss({name: total / count for name, total in totals.items()}, count)


def _late(change: Callable[[Tensor], Tensor], skip: int) -> Callable[[Tensor], Tensor]:
    """The map at positions >= skip; others keep their bits."""

    def apply(x: Tensor) -> Tensor:
        out = x.clone()
        out[:, skip:] = change(x[:, skip:].float()).to(x.dtype)
        return out

    return apply


def _loss(model: nn.Module, ids: Tensor, skip: int) -> float:
    """Sum of next-token losses at positions >= skip."""
    answer = model(ids)
    logits = getattr(answer, "logits", answer)[:, skip:-1].flatten(0, 1)
    targets = ids[:, skip + 1 :].flatten()
    return sum(
        float(nn.functional.cross_entropy(some.double(), wanted, reduction="sum"))
        for some, wanted in zip(logits.split(64), targets.split(64), strict=True)
    )
