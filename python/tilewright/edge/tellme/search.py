# SPDX-License-Identifier: Apache-2.0
"""Which build is fastest inside a budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tilewright.edge.contract.weights import Tiling
from tilewright.edge.tellme.config import OURS, PAPER_BUDGET, Packing, Resources, Shape, TellmeConfig

T_CHOICES = (14, 28, 42)
Q_CHOICES = tuple(range(4, 42, 2))
P_CHOICES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Found:
    """A build, and how much faster it is than the published figures: decode, and the lesser of the two prompts."""

    config: TellmeConfig
    decode: float
    prefill: float

    @property
    def score(self) -> float:
        """Decode matters where prefill is fast already, and the other way round: their product."""
        return self.decode * self.prefill

    @property
    def reaches(self) -> bool:
        """Both aims: 1.3 times the decode, twice the prefill."""
        return self.decode >= 1.3 and self.prefill >= 2


def builds(
    shape: Shape, f_mhz: float = 250.0, packings: Sequence[Packing] = ("beats", "dense", "trits")
) -> Iterator[TellmeConfig]:
    """All combinations whose pieces fit the buffer."""
    for t, q, p, overlap, hidden, packing in itertools.product(
        T_CHOICES, Q_CHOICES, P_CHOICES, (False, True), (False, True), packings
    ):
        config = TellmeConfig(
            shape,
            Tiling(3, t, q, p),
            OURS,
            f_mhz,
            fill=0 if hidden else 27,
            fused=True,
            overlap=overlap,
            packing=packing,
        )
        try:
            config.layer_cycles()
        except ValueError:
            continue
        yield config


def search(
    shape: Shape,
    budget: Resources = PAPER_BUDGET,
    *,
    f_mhz: float = 250.0,
    decode: float = 25.0,
    ttft: tuple[float, float] = (0.45, 0.96),
    packings: Sequence[Packing] = ("beats", "dense", "trits"),
) -> list[Found]:
    """Builds inside the budget: those that reach both aims first, by the product of their gains.

    Args:
        decode, ttft: published tokens a second at 64 tokens of context, and seconds to the first token of 64 and 128.
    """
    found = []
    for config in builds(shape, f_mhz, packings):
        if config.resources().fits(budget):
            prefill = min(ttft[0] / config.ttft(64), ttft[1] / config.ttft(128))
            found.append(Found(config, config.tokens_per_s() / decode, prefill))
    return sorted(found, key=lambda one: (not one.reaches, -one.score, one.config.resources().lut))
