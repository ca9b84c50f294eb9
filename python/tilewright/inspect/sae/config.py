# SPDX-License-Identifier: Apache-2.0
"""Settings of one SAE training, with the recipes' defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("topk", "batchtopk", "jumprelu")
NORMALIZATIONS = ("none", "scale", "center")


@dataclass(frozen=True)
class SAEConfig:
    """What is trained and how. None stands for the recipe's value.

    kind: topk (Gao et al. 2024), batchtopk (Bussmann et al. 2024) or jumprelu (Rajamanoharan et al. 2024). width:
    latents m. k: active latents of a token. steps, batch: optimizer steps and tokens of each.
    lr: 2e-4 / sqrt(m / 2^14), or 7e-5 for jumprelu. warmup: steps of linear rise, min(1000, steps / 10); then linear
    fall to 0. betas: of Adam, (0.9, 0.999), or (0, 0.999) for jumprelu. grad_clip: largest norm of all gradients.
    normalize: "scale" so that the mean of ||x||^2 is d, "center" to subtract the mean first, or "none"; estimated on
    the first ``normalize_rows`` rows and folded into the finished weights.
    auxk_alpha: weight of the dead latents' loss (0 turns it off, 1/32 in Gao et al.). dead_after: a latent is dead when
    it has not fired for so many tokens. multi_topk: add 1/8 of the loss with 4 k latents.
    sparsity: lambda of jumprelu's ||f||_0, reached linearly in ``sparsity_warmup`` steps (half of all). bandwidth,
    threshold: e and the first theta of jumprelu.
    buffer: rows held in memory for shuffling.

    Raises:
        ValueError: a setting is out of its range.
    """

    kind: str = "topk"
    width: int = 4096
    k: int = 32
    steps: int = 1000
    batch: int = 4096
    lr: float | None = None
    warmup: int | None = None
    betas: tuple[float, float] | None = None
    grad_clip: float = 1.0
    normalize: str = "scale"
    normalize_rows: int = 1 << 16
    auxk_alpha: float = 0.0
    dead_after: int = 10_000_000
    multi_topk: bool = False
    sparsity: float = 1e-3
    sparsity_warmup: int | None = None
    bandwidth: float = 1e-3
    threshold: float = 1e-3
    buffer: int = 1 << 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not known; choose one of {', '.join(KINDS)}")
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize={self.normalize!r} is not known; choose one of {', '.join(NORMALIZATIONS)}")
        for name in ("width", "k", "steps", "batch", "normalize_rows", "buffer", "dead_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.kind != "jumprelu" and self.k > self.width:
            raise ValueError(f"k={self.k} is more than the width {self.width}")
        for name in ("grad_clip", "bandwidth", "threshold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: more than 0 is needed")
        if self.auxk_alpha < 0 or self.sparsity < 0:
            raise ValueError(f"auxk_alpha={self.auxk_alpha}, sparsity={self.sparsity}: 0 or more is needed")

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        if self.lr is not None:
            return self.lr
        return 7e-5 if self.kind == "jumprelu" else 2e-4 / (self.width / 2**14) ** 0.5

    @property
    def adam_betas(self) -> tuple[float, float]:
        if self.betas is not None:
            return (float(self.betas[0]), float(self.betas[1]))
        return (0.0, 0.999) if self.kind == "jumprelu" else (0.9, 0.999)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step counted from 0: linear rise, then linear fall that would reach 0 after the last."""
        warmup = min(1000, self.steps // 10) if self.warmup is None else self.warmup
        if step < warmup:
            return self.rate * (step + 1) / warmup
        return self.rate * (self.steps - step) / max(1, self.steps - warmup)

    def sparsity_at(self, step: int) -> float:
        """jumprelu's lambda at a step."""
        rise = self.steps // 2 if self.sparsity_warmup is None else self.sparsity_warmup
        return self.sparsity * min(1.0, (step + 1) / max(1, rise))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
