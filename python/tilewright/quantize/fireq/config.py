# SPDX-License-Identifier: Apache-2.0
"""Settings of FireQ, validated when made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.quantize._config import require_one_of, require_positive, strict

SITES = ("attention_input", "attention_output", "mlp_input", "mlp_output")
SCALE_DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn")


@dataclass(frozen=True)
class ChannelScaling:
    """Scaling of the input channels of one kind of linear by Lambda_j = const / stat_i |W_ij| (spec section 3).

    site: "attention_input" (q, k, v; the producer is the norm before), "attention_output" (o; rows of
        V), "mlp_input" (gate, up; the norm before) or "mlp_output" (down; rows of up).
    stat: "mean" (the released recipe) or "max" (the paper's text), over the rows of W. With "max" one
        outlier in a column shrinks the whole column under the grid of its group; on SmolLM2 that is worse
        than no scaling, while "mean" is clearly better (docs/methods/fireq.md has the figures).
    const: a number, or "auto": the geometric mean of the statistic over channels, so that the overall
        gain of the weight stays.
    """

    site: str
    stat: str = "mean"
    const: float | str = "auto"

    def __post_init__(self) -> None:
        require_one_of("ChannelScaling", "site", self.site, SITES)
        require_one_of("ChannelScaling", "stat", self.stat, ("max", "mean"))
        if self.const != "auto":
            require_positive("ChannelScaling", "const", self.const)


@dataclass(frozen=True)
class FireQConfig:
    """FireQ (arXiv 2505.20839): INT4 weights, FP8 activations, INT4 keys and values.

    weights: "int4" rounds every linear to the symmetric INT4 grid; "keep" leaves weights that are
        already low-bit untouched, integers and scales; "auto" keeps if the model has INT4 weights.
    mode: "exact" (group scales on float32 partial sums) or the paper's "fold" (weights e4m3(q s)).
    activations: "fp8" per token (the paper), or "int8", which the decode engine scales per 64 columns.
    group_size: columns that share a scale, a multiple of 16.
    scale_dtype: of group scales; "auto" is bfloat16 in exact mode and float8_e4m3fn in fold mode.
    per_tensor_scale: p against underflow of FP8 scales: "auto" (the largest power of two that cannot
        saturate), "repo" (the released code's search), "none", or a number. Only for FP8 scales,
        unless it is a number.
    channel_scaling: which linears get channel scaling; "auto" is the recipe's MLP sites for "int4"
        weights and none for kept ones, whose columns cannot take factors.
    search: exponents r of an AWQ-style search: at each of those sites Lambda = mean|x|^r replaces the
        weight statistic where it gives a lower output error. Empty: no search.
    v_mul: W_v times this, W_o divided by it.
    pre_rope, post_rope_top_k, alpha, beta: RoPE-aware key scaling (section 4); top_k 0 turns the
        post-RoPE part off. Without effect at kv_bits 16.
    pre_rope_placement: "rows" multiplies rows of W_k and W_q; "online" folds the pre-RoPE scales,
        which commute with the rotation, into the post-RoPE scale; "auto" is "rows" for "int4"
        weights and "online" for kept ones.
    kv_bits: 4 or 16.

    Raises:
        ValueError: a field has a value that is not allowed; the message names it.
    """

    weights: str = "auto"
    mode: str = "exact"
    activations: str = "fp8"
    group_size: int = 128
    scale_dtype: str = "auto"
    per_tensor_scale: float | str = "auto"
    channel_scaling: tuple[ChannelScaling, ...] | str = "auto"
    search: tuple[float, ...] = ()
    v_mul: float = 1.0
    pre_rope: bool = True
    pre_rope_placement: str = "auto"
    post_rope_top_k: int = 8
    alpha: float = 8.0
    beta: float = 8.0
    kv_bits: int = 4

    def __post_init__(self) -> None:
        name = "FireQConfig"
        require_one_of(name, "weights", self.weights, ("auto", "int4", "keep"))
        require_one_of(name, "mode", self.mode, ("exact", "fold"))
        require_one_of(name, "activations", self.activations, ("fp8", "int8"))
        require_one_of(name, "scale_dtype", self.scale_dtype, ("auto", *SCALE_DTYPES))
        require_one_of(name, "pre_rope_placement", self.pre_rope_placement, ("auto", "rows", "online"))
        require_one_of(name, "pre_rope", self.pre_rope, (True, False))
        require_one_of(name, "kv_bits", self.kv_bits, (4, 16))
        for field in ("v_mul", "alpha", "beta"):
            require_positive(name, field, getattr(self, field))
        if isinstance(self.per_tensor_scale, str):
            require_one_of(name, "per_tensor_scale", self.per_tensor_scale, ("auto", "repo", "none"))
        else:
            require_positive(name, "per_tensor_scale", self.per_tensor_scale)
        for field in ("group_size", "post_rope_top_k"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: {field}={value!r}; a whole number is needed")
        if self.group_size == 0 or self.group_size % 16:
            raise ValueError(f"{name}: group_size={self.group_size}; a positive multiple of 16 is needed")
        self._check_channels()
        self._check_mode()

    def _check_channels(self) -> None:
        if isinstance(self.channel_scaling, str):
            require_one_of("FireQConfig", "channel_scaling", self.channel_scaling, ("auto",))
        else:
            if not all(isinstance(c, ChannelScaling) for c in self.channel_scaling):
                raise ValueError("FireQConfig: channel_scaling holds something that is not a ChannelScaling")
            sites = [c.site for c in self.channel_scaling]
            if len(set(sites)) != len(sites):
                raise ValueError(f"FireQConfig: channel_scaling names a site twice: {', '.join(sites)}")
        for r in self.search:
            if isinstance(r, bool) or not isinstance(r, (int, float)) or not 0 <= r <= 2:
                raise ValueError(f"FireQConfig: search holds the exponent {r!r}; numbers in 0..2 are needed")

    def _check_mode(self) -> None:
        if self.mode == "fold" and self.activations == "int8":
            raise ValueError("FireQConfig: mode='fold' multiplies FP8 by FP8; activations='int8' needs mode='exact'")
        if self.weights == "keep" and self.channel_scaling not in ("auto", ()):
            raise ValueError(
                "FireQConfig: weights='keep' leaves the integers as they are, and a factor per column does not fit "
                "into group scales; use channel_scaling=() or weights='int4'"
            )

    @property
    def weight_scale_dtype(self) -> torch.dtype:
        """The dtype of group scales, with "auto" resolved."""
        automatic = "float8_e4m3fn" if self.mode == "fold" else "bfloat16"
        dtype: torch.dtype = getattr(torch, automatic if self.scale_dtype == "auto" else self.scale_dtype)
        return dtype

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` restores an equal config."""
        return dataclasses.asdict(self) | {
            "channel_scaling": self.channel_scaling
            if isinstance(self.channel_scaling, str)
            else [dataclasses.asdict(c) for c in self.channel_scaling],
            "search": list(self.search),
        }

    @classmethod
    def from_dict(cls, raw: Any) -> FireQConfig:
        """The inverse of :meth:`to_dict`; missing keys take their defaults, unknown ones raise ValueError."""
        values = strict(cls, raw)
        if values.get("channel_scaling", "auto") != "auto":
            values["channel_scaling"] = tuple(map(_channel_scaling, _listed("channel_scaling", values)))
        if "search" in values:
            values["search"] = tuple(_listed("search", values))
        return cls(**values)


def _listed(name: str, values: dict[str, Any]) -> list[Any] | tuple[Any, ...]:
    value = values[name]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"FireQConfig: {name}={value!r}; a list is needed")
    return value


def _channel_scaling(raw: Any) -> ChannelScaling:
    if isinstance(raw, ChannelScaling):
        return raw
    values = strict(ChannelScaling, raw)
    if "site" not in values:
        raise ValueError(f"ChannelScaling: key 'site' is missing; need one of {', '.join(SITES)}")
    return ChannelScaling(**values)


LLAMA3_8B_RECIPE = FireQConfig(
    weights="int4",
    mode="fold",
    channel_scaling=(ChannelScaling("mlp_input", "mean", 0.0096), ChannelScaling("mlp_output", "mean", 0.015)),
    v_mul=0.9,
)
"""The released recipe for Llama-3-8B. Its constants are statistics of that model and do not transfer."""
