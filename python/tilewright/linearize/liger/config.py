# SPDX-License-Identifier: Apache-2.0
"""Settings of Liger, validated when made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tilewright.quantize._config import require_one_of, require_positive, strict

VARIANTS = ("gla", "hgrn2", "gsa")
GATES = ("key", "random", "none")


@dataclass(frozen=True)
class LigerConfig:
    """What replaces softmax attention: o = alpha y_recurrent + beta y_window (arXiv 2503.01496, eq. 8).

    variant: "gla", "hgrn2" or "gsa" (gated slot attention); :mod:`tilewright.linearize.liger.recurrence` has each.
    window_size: the softmax branch sees the query's own position and window_size - 1 before it.
    alpha, beta: weights of the recurrent and of the softmax branch; one of them may be 0.
    gate_logit_normalizer: the log-decay is logsigmoid(gate logit) / this ("gla", "gsa"; "hgrn2" has none).
    pool: "identity": the gate logit of a channel is that channel of the key. A number p: averages over the p equal
        groups of a head's channels, each repeated for its group ("gla", "hgrn2") or taken as one of p slots ("gsa").
    normalize: divide the recurrent branch by q . z, z the decayed sum of keys. Not in the paper; not for "gsa".
    gate: "key" (the method), or what its ablation compares: "random" (a fixed random projection of the key), "none" (no
        decay).

    Raises:
        ValueError: a field has a value that is not allowed; the message names it.
    """

    variant: str = "gla"
    window_size: int = 64
    alpha: float = 0.5
    beta: float = 0.5
    gate_logit_normalizer: float = 16.0
    pool: str | int = "identity"
    normalize: bool = False
    gate: str = "key"

    def __post_init__(self) -> None:
        name = "LigerConfig"
        require_one_of(name, "variant", self.variant, VARIANTS)
        require_one_of(name, "normalize", self.normalize, (True, False))
        require_one_of(name, "gate", self.gate, GATES)
        require_positive(name, "gate_logit_normalizer", self.gate_logit_normalizer)
        require_count(name, "window_size", self.window_size)
        for field in ("alpha", "beta"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}: {field}={value!r}; a finite number of at least 0 is needed")
        if self.alpha == self.beta == 0:
            raise ValueError(f"{name}: alpha and beta are both 0; nothing would be left of attention")
        if self.pool != "identity":
            if isinstance(self.pool, str):
                raise ValueError(f"{name}: pool={self.pool!r}; 'identity' or a number of groups is needed")
            require_count(name, "pool", self.pool)
        if self.normalize and self.variant == "gsa":
            raise ValueError(f"{name}: normalize=True with variant='gsa'; its slot weights are normalized already")
        if self.gate == "none" and self.variant != "gla":
            raise ValueError(f"{name}: gate='none' with variant={self.variant!r}, whose keys come from the gate")

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Any) -> LigerConfig:
        """The inverse of :meth:`to_dict`; an unknown key is an error."""
        return cls(**strict(cls, raw))


@dataclass(frozen=True)
class LigerRecipe:
    """How a converted model is tuned: LoRA on the projections, next-token cross-entropy, one stage (section 4.1).

    steps: optimizer steps; 0 converts only. lr: of AdamW, without weight decay; falls to a tenth along a half cosine
    after a linear rise over ``warmup`` steps. clip: largest norm of the gradient. r, lora_alpha, lora_dropout,
    target_modules: of the adapters, which are merged at the end. seed: of the adapters' first values.
    """

    steps: int = 200
    lr: float = 1e-3
    warmup: int = 10
    clip: float = 1.0
    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    seed: int = 0

    def __post_init__(self) -> None:
        name = "LigerRecipe"
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for field in ("steps", "warmup"):
            require_count(name, field, getattr(self, field), least=0)
        require_count(name, "r", self.r)
        for field in ("lr", "clip", "lora_alpha"):
            require_positive(name, field, getattr(self, field))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"{name}: seed={self.seed!r}; a whole number is needed")

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self) | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, raw: Any) -> LigerRecipe:
        """The inverse of :meth:`to_dict`; an unknown key is an error."""
        return cls(**strict(cls, raw))


def require_count(owner: str, name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError naming the field unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner}: {name}={value!r}; a whole number of at least {least} is needed")
