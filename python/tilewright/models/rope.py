# SPDX-License-Identifier: Apache-2.0
"""Rotary position frequencies of the Llama family, one definition for every runtime.

Conventions of transformers: half-split pairs ``(i, i + head_dim/2)``, frequencies in float32.
Sources: RoPE (arXiv 2104.09864), position interpolation (2306.15595), YaRN (2309.00071),
the Llama 3.1 rule (Meta's reference code).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilewright.models.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("linear", "llama3", "yarn", "factors")
_KNOWN_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("truncate", "short_factor", "long_factor", "finetuned"),
}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class RopeScaling:
    """How the plain frequencies ``theta^(-2i/head_dim)`` are changed.

    kind: ``linear`` (divide by ``factor``), ``llama3`` (divide long wavelengths only), ``yarn``
    (blend between two cut-offs, and scale the rotation by ``attention_factor``) or ``factors``
    (divide frequency i by ``factors[i]``, the form in which GGUF files carry any rule).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CheckpointError(
                f"rope scaling: kind={self.kind!r} is not supported; supported are {', '.join(KINDS)}"
            )
        numbers = {
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
        }
        numbers |= {f"factors[{i}]": f for i, f in enumerate(self.factors)}
        if self.attention_factor is not None:
            numbers["attention_factor"] = self.attention_factor
        for name, value in numbers.items():
            if not (isinstance(value, (int, float)) and math.isfinite(value) and 0 < value <= 1e6):
                raise CheckpointError(f"rope scaling: {name}={value!r} must be a number in (0, 1e6]")
        if self.kind in ("llama3", "yarn") and not self.original_max_position_embeddings:
            raise CheckpointError(f"rope scaling: kind {self.kind!r} needs original_max_position_embeddings")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"rope scaling: high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )
        if self.kind == "factors" and not self.factors:
            raise CheckpointError(
                "rope scaling: kind 'factors' needs one factor for each of the head_dim/2 frequencies"
            )

    @property
    def rotation_gain(self) -> float:
        """Factor on cos and sin (YaRN, eq. 15's sqrt(1/t)); 1 for the other kinds."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1.0


def rope_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> Tensor:
    """Angular frequency of each rotary pair: float32 [head_dim / 2], radians per position."""
    import torch

    base = theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim)
    plain = 1.0 / base
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "factors":
        return 1.0 / (torch.tensor(scaling.factors, dtype=torch.float32) * base)
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(base, theta, head_dim, scaling)


def _llama3(plain: Tensor, s: RopeScaling) -> Tensor:
    import torch

    assert s.original_max_position_embeddings is not None
    context = s.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    low, high = context / s.low_freq_factor, context / s.high_freq_factor
    slowed = torch.where(wavelength > low, plain / s.factor, plain)
    smooth = (context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blended = (1 - smooth) * slowed / s.factor + smooth * slowed
    between = ~(wavelength < high) & ~(wavelength > low)
    return torch.where(between, blended, slowed)


def _yarn(base: Tensor, theta: float, head_dim: int, s: RopeScaling) -> Tensor:
    import torch

    context = s.original_max_position_embeddings
    assert context is not None

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with_turns(s.beta_fast), pair_with_turns(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return 1.0 / (s.factor * base) * (1 - keep) + 1.0 / base * keep


def rope_from_transformers(raw: dict[str, Any], max_positions: int) -> RopeScaling | None:
    """``rope_scaling`` / ``rope_parameters`` of a transformers config to :class:`RopeScaling`.

    Raises:
        CheckpointError: for a rule that is not supported (dynamic, longrope with two factor lists).
    """
    if unknown := sorted(map(str, raw.keys() - _KNOWN_KEYS)):
        raise CheckpointError(f"config: rope key {unknown[0][:60]!r} is unknown; it may change the positions")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default" or (kind == "linear" and raw.get("factor") == 1.0):
        return None
    try:
        if kind == "linear":
            return RopeScaling("linear", factor=raw["factor"])
        if kind == "llama3":
            return RopeScaling("llama3", **{k: raw[k] for k in _LLAMA3_KEYS})
        if kind == "yarn":
            return _yarn_from_transformers(raw, max_positions)
        if kind == "longrope" and raw["short_factor"] == raw["long_factor"] and raw.get("attention_factor") == 1.0:
            return RopeScaling("factors", factors=tuple(raw["short_factor"]))
    except KeyError as missing:
        raise CheckpointError(f"config: rope type {kind!r} needs {missing.args[0]!r}, which is missing") from None
    except TypeError as wrong:
        raise CheckpointError(f"config: rope type {kind!r} has a value of the wrong kind: {wrong}") from None
    raise CheckpointError(
        f"config: rope type {kind!r} is not supported; supported are default, linear, llama3 and yarn "
        "(a fixed longrope too, if short_factor equals long_factor)"
    )


def _yarn_from_transformers(raw: dict[str, Any], max_positions: int) -> RopeScaling:
    gain = raw.get("attention_factor")
    if gain is None and raw.get("mscale") and raw.get("mscale_all_dim"):
        scale = math.log(raw["factor"]) if raw["factor"] > 1 else 0.0
        gain = (0.1 * raw["mscale"] * scale + 1.0) / (0.1 * raw["mscale_all_dim"] * scale + 1.0)
    return RopeScaling(
        "yarn",
        factor=raw["factor"],
        original_max_position_embeddings=raw.get("original_max_position_embeddings") or max_positions,
        attention_factor=gain,
        beta_fast=raw.get("beta_fast") or 32.0,
        beta_slow=raw.get("beta_slow") or 1.0,
        truncate=raw.get("truncate", True),
    )


def rope_to_transformers(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of :func:`rope_from_transformers`, in the form of transformers 5 (``rope_parameters``)."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": scaling.factor}
    if scaling.kind == "llama3":
        return {"rope_type": "llama3", "rope_theta": theta} | {k: getattr(scaling, k) for k in _LLAMA3_KEYS}
    if scaling.kind == "factors":
        factors = list(scaling.factors)
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "factor": 1.0,
        }
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "attention_factor": scaling.rotation_gain,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
    }


def rope_from_factors(factors: tuple[float, ...], theta: float, head_dim: int) -> RopeScaling | None:
    """The rule behind a GGUF file's ``rope_freqs`` tensor.

    Files written from Llama 3.x carry only the resulting divisors. Where the published parameters of
    that family reproduce them, the rule itself is returned; otherwise the divisors are kept as they are.
    """
    import torch

    if all(f == 1.0 for f in factors):
        return None
    given = torch.tensor(factors, dtype=torch.float32)
    plain = rope_frequencies(theta, head_dim, None)
    rule = RopeScaling("llama3", factor=max(factors), original_max_position_embeddings=8192)
    if torch.allclose(plain / _llama3(plain, rule), given, rtol=1e-6, atol=0):
        return rule
    return RopeScaling("factors", factors=factors)
