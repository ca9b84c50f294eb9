# SPDX-License-Identifier: Apache-2.0
"""Settings of Hedgehog, validated when made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tilewright.nn.hedgehog.feature_maps import ACTIVATIONS
from tilewright.quantize._config import require_one_of, require_positive, strict

FEATURE_MAPS = ("hedgehog", "elu", "relu", "performer")
KEY_MAPS = ("kv_heads", "query_heads")
KINDS = ("xent", "kl", "mse")


@dataclass(frozen=True)
class HedgehogConfig:
    """What replaces softmax attention (arXiv 2402.04347; the window: arXiv 2410.10254).

    feature_map: "hedgehog", or a fixed map to compare with: "elu", "relu", "performer".
    activation, feature_dim, bias, init: of :class:`tilewright.nn.hedgehog.HedgehogFeatureMap`.
    key_maps: "kv_heads" gives each key head one map; "query_heads" one for every query head that reads it, as the
        reference has it (H / H_kv times the parameters and work of the key maps; the same without grouped heads).
    window_size: softmax on so many last tokens, the query's own included; None: none.
    mix_logit: of the window's weight, sigmoid(mix_logit) at first, learned per head.

    Raises:
        ValueError: a field has a value that is not allowed; the message names it.
    """

    feature_map: str = "hedgehog"
    activation: str = "softmax_dim"
    feature_dim: int | None = None
    bias: bool = False
    init: str | float = "identity"
    key_maps: str = "kv_heads"
    window_size: int | None = None
    mix_logit: float = -2.197

    def __post_init__(self) -> None:
        name = "HedgehogConfig"
        require_one_of(name, "feature_map", self.feature_map, FEATURE_MAPS)
        require_one_of(name, "activation", self.activation, ACTIVATIONS)
        require_one_of(name, "bias", self.bias, (True, False))
        require_one_of(name, "key_maps", self.key_maps, KEY_MAPS)
        for field in ("feature_dim", "window_size"):
            if getattr(self, field) is not None:
                require_count(name, field, getattr(self, field))
        if isinstance(self.init, str):
            require_one_of(name, "init", self.init, ("identity", "scaled"))
        else:
            require_positive(name, "init", self.init)
        if isinstance(self.mix_logit, bool) or not isinstance(self.mix_logit, (int, float)):
            raise ValueError(f"{name}: mix_logit={self.mix_logit!r}; a number is needed")
        if not math.isfinite(self.mix_logit):
            raise ValueError(f"{name}: mix_logit={self.mix_logit!r}; a finite number is needed")

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Any) -> HedgehogConfig:
        """The inverse of :meth:`to_dict`; an unknown key is an error."""
        return cls(**strict(cls, raw))


@dataclass(frozen=True)
class HedgehogRecipe:
    """How a converted model is trained: the maps imitate the softmax weights, then LoRA on next tokens.

    distill_steps: optimizer steps of distillation; 0 skips it. distill_lr: of AdamW without weight decay.
    kind: "xent" (the paper), "kl" (the same gradient), or "mse" of the attention's outputs (LoLCATs).
    steps: of LoRA afterwards, 0 for none. lr: falls to a tenth along a half cosine after a linear rise over
    ``warmup`` steps. clip: largest norm of the gradient. r, lora_alpha, lora_dropout, target_modules: of the adapters,
    merged at the end. seed: of the adapters' first values.
    """

    distill_steps: int = 200
    distill_lr: float = 1e-2
    kind: str = "xent"
    steps: int = 200
    lr: float = 1e-3
    warmup: int = 10
    clip: float = 1.0
    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    seed: int = 0

    def __post_init__(self) -> None:
        name = "HedgehogRecipe"
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for field in ("distill_steps", "steps", "warmup"):
            require_count(name, field, getattr(self, field), least=0)
        require_count(name, "r", self.r)
        require_one_of(name, "kind", self.kind, KINDS)
        for field in ("distill_lr", "lr", "clip", "lora_alpha"):
            require_positive(name, field, getattr(self, field))
        require_count(name, "seed", self.seed, least=0)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return dataclasses.asdict(self) | {"target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, raw: Any) -> HedgehogRecipe:
        """The inverse of :meth:`to_dict`; an unknown key is an error."""
        return cls(**strict(cls, raw))


def require_count(owner: str, name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError naming the field unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner}: {name}={value!r}; a whole number of at least {least} is needed")
