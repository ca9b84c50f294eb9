# SPDX-License-Identifier: Apache-2.0
"""FireQ on a language model: calibrate, scale, round, record (arXiv 2505.20839)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilewright._progress import track
from tilewright.capture import Batch, Reducer, Site, observe
from tilewright.formats import Int4Weight, quantize_int4
from tilewright.models.language_model import LINEARS, LanguageModel, Weight
from tilewright.quantize._model import keeps_weights, quantized, require_unquantized
from tilewright.quantize.fireq.channels import channel_factors, scale_channels, scale_values
from tilewright.quantize.fireq.config import ChannelScaling, FireQConfig
from tilewright.quantize.fireq.per_tensor import repo_per_tensor_scale
from tilewright.quantize.fireq.rope import KeyRange, KeyScales, key_scales, key_site, scale_rows, split_range
from tilewright.quantize.fireq.search import SiteError, SiteInput, best_factors, input_reducer, input_site
from tilewright.quantize.simulate import fake_activations
from tilewright.reducers import AbsMax

ACTIVATION_GROUP = 64
"""Columns that share a scale of INT8 activations in the decode engine."""
DEFAULT_CHANNELS = (ChannelScaling("mlp_input"), ChannelScaling("mlp_output"))


@dataclass(frozen=True)
class Plan:
    """A config with every "auto" resolved for one model."""

    config: FireQConfig
    keep: bool
    channels: tuple[ChannelScaling, ...]
    scale_keys: bool
    online: bool


@dataclass
class Calibration:
    """What calibration saw: the keys of each layer, and per site the inputs of each layer (only for a search)."""

    keys: list[KeyRange] = field(default_factory=list)
    inputs: dict[str, list[SiteInput]] = field(default_factory=dict)
    batches: int = 0


def quantize_model(
    model: LanguageModel,
    config: FireQConfig | None = None,
    calibration_batches: Iterable[Batch] | None = None,
) -> LanguageModel:
    """A new model with FireQ's weights, scales and settings; ``model`` is not changed.

    Linears become :class:`tilewright.formats.Int4Weight` (or stay, see ``FireQConfig.weights``); the
    post-RoPE key scale S [H_kv, D] of layer i becomes ``model.layers.i.self_attn.key_scale``.

    Args:
        calibration_batches: tokens [B, T] (or mappings with an attention mask, padded on the right) of
            real text; the paper's code takes 10 x 2048 tokens. Needed for RoPE-aware scaling of an INT4
            cache and for a search, not otherwise.

    Raises:
        ValueError: the model is already quantized, calibration is missing, or the config does not fit the
            model (kept weights with channel scaling, top_k beyond the head size, weights not finite).
    """
    config = config or FireQConfig()
    require_unquantized(model)
    plan = resolve(config, model)
    seen = _calibrate(model, plan, calibration_batches)
    work = _Layers(model, plan, seen)
    changed: dict[str, Weight] = {}
    for layer in track(range(model.config.num_hidden_layers), "quantizing layers"):
        changed |= work.quantize(layer)
    return quantized(
        model,
        changed,
        method="fireq",
        config=config.to_dict(),
        settings={
            "activations": config.activations,
            "mode": config.mode,
            "kv_bits": config.kv_bits,
            "calibration_batches": seen.batches,
        },
        notes=_notes(plan, work.chosen),
    )


def resolve(config: FireQConfig, model: LanguageModel) -> Plan:
    """Fit a config to a model.

    Raises:
        ValueError: an option needs weights rounded anew and this model's are kept, or a size does not fit.
    """
    keep = keeps_weights(model, config.weights)
    channels = config.channel_scaling
    if isinstance(channels, str):
        channels = () if keep else DEFAULT_CHANNELS
    if keep:
        _require_keepable(config, channels)
    if config.search and not channels:
        raise ValueError("FireQConfig: search chooses factors for channel_scaling, which names no site")
    if config.post_rope_top_k > model.config.head_dim:
        raise ValueError(
            f"FireQConfig: post_rope_top_k={config.post_rope_top_k}, but a head of this model has "
            f"{model.config.head_dim} channels"
        )
    scale_keys = config.kv_bits == 4 and (config.pre_rope or config.post_rope_top_k > 0)
    return Plan(config, keep, channels, scale_keys, keep or config.pre_rope_placement == "online")


def _require_keepable(config: FireQConfig, channels: tuple[ChannelScaling, ...]) -> None:
    if channels or config.search or config.v_mul != 1.0:
        raise ValueError(
            "FireQConfig: this model's INT4 weights are kept, and a factor per column does not fit into group scales; "
            "use channel_scaling=(), search=() and v_mul=1, or weights='int4' to round anew"
        )
    if config.mode == "fold":
        raise ValueError("FireQConfig: mode='fold' needs FP8 group scales; kept weights need mode='exact'")
    if config.pre_rope_placement == "rows":
        raise ValueError(
            "FireQConfig: pre_rope_placement='rows' would change kept weights; use 'online' (exact, no cost "
            "beside the post-RoPE scale) or weights='int4'"
        )


def _calibrate(model: LanguageModel, plan: Plan, batches: Iterable[Batch] | None) -> Calibration:
    """One pass over the data for everything the plan needs; no pass when it needs nothing."""
    if not plan.scale_keys and not plan.config.search:
        return Calibration()
    if batches is None:
        raise ValueError("fireq: calibration_batches is missing; RoPE-aware scaling and search need real text")
    from tilewright.models import to_transformers

    searched = plan.channels if plan.config.search else ()
    sites: dict[str | Site, Callable[[], Reducer]] = {input_site(c.site): input_reducer for c in searched}
    if plan.scale_keys:
        sites[key_site(model.config)] = AbsMax
    stream = _Counted(batches)
    results = observe(to_transformers(model, dequantize=True), stream, sites, description="calibrating")
    seen = Calibration(batches=stream.count)
    for name, value in results.items():
        if name.endswith(".self_attn.k_proj@output"):
            seen.keys.append(split_range(value, model.config))
    for c in searched:
        ending = input_site(c.site).pattern.rpartition("*")[2] + "@input"
        seen.inputs[c.site] = [SiteInput(*value) for name, value in results.items() if name.endswith(ending)]
    return seen


class _Counted:
    """Remembers how many items were taken."""

    def __init__(self, items: Iterable[Batch]) -> None:
        self.items, self.count = items, 0

    def __iter__(self) -> Iterator[Batch]:
        for item in self.items:
            self.count += 1
            yield item


@dataclass
class _Layers:
    """Scales and rounds one decoder layer after the other; ``chosen`` counts the search's winners."""

    model: LanguageModel
    plan: Plan
    seen: Calibration
    chosen: dict[str, int] = field(default_factory=dict)

    def quantize(self, layer: int) -> dict[str, Weight]:
        """The changed weights of one layer, by name."""
        config, prefix = self.plan.config, f"model.layers.{layer}."
        changed: dict[str, Weight] = {}
        weights = {} if self.plan.keep else self._floats(prefix)
        before = dict(weights)
        for scaling in self.plan.channels:
            factor = self._factor(weights, layer, scaling)
            scale_channels(weights, prefix, scaling.site, factor, self.model.config)
        if config.v_mul != 1.0:
            scale_values(weights, prefix, config.v_mul)
        if self.plan.scale_keys:
            scales = self._key_scales(layer)
            if not self.plan.online:
                scale_rows(weights, f"{prefix}self_attn.", scales.pre, self.model.config)
            changed |= _online_scale(scales, self.plan, f"{prefix}self_attn.key_scale")
        for name, weight in weights.items():
            if name.removeprefix(prefix).removesuffix(".weight") in LINEARS:
                changed[name] = round_weight(weight, config)
            elif weight is not before[name]:
                changed[name] = weight
        return changed

    def _floats(self, prefix: str) -> dict[str, Tensor]:
        """Linears, norms and biases of one layer in float32."""
        return {name: self.model.dense(name) for name in self.model.weights if name.startswith(prefix)}

    def _key_scales(self, layer: int) -> KeyScales:
        config = self.plan.config
        return key_scales(
            self.seen.keys[layer],
            pre=config.pre_rope,
            top_k=config.post_rope_top_k,
            alpha=config.alpha,
            beta=config.beta,
        )

    def _factor(self, weights: dict[str, Tensor], layer: int, scaling: ChannelScaling) -> Tensor:
        """Lambda of one site: from weights, or the search's winner."""
        config, prefix = self.plan.config, f"model.layers.{layer}."
        factor = channel_factors(weights, prefix, scaling, self.model.config)
        if not config.search:
            return factor
        inputs = self.seen.inputs[scaling.site][layer]
        error = SiteError(
            weights,
            prefix,
            scaling.site,
            inputs.sample,
            lambda w: round_weight(w, config).dequantize(),
            fake_activations(config.activations, ACTIVATION_GROUP if config.activations == "int8" else None),
            self.model.config,
        )
        factor, winner = best_factors(error, factor, inputs.mean, config.search)
        key = f"{scaling.site}: {winner}"
        self.chosen[key] = self.chosen.get(key, 0) + 1
        return factor


def round_weight(weight: Tensor, config: FireQConfig) -> Int4Weight:
    """A float weight [N, K] on FireQ's INT4 grid: group scales, and p where scales are FP8 (sections 1 and 2)."""
    dtype, p = config.weight_scale_dtype, config.per_tensor_scale
    if isinstance(p, str):
        if p == "none" or dtype != torch.float8_e4m3fn:
            return quantize_int4(weight, config.group_size, dtype)
        p = repo_per_tensor_scale(weight, config.group_size) if p == "repo" else "auto"
    return quantize_int4(weight, config.group_size, dtype, p)  # type: ignore[arg-type]


def _online_scale(scales: KeyScales, plan: Plan, name: str) -> dict[str, Weight]:
    """The factor after RoPE: S, times N where the rows do not carry it; nothing where it would be all ones."""
    factor = scales.combined if plan.online else scales.post
    needed = plan.config.post_rope_top_k > 0 or plan.online
    return {name: factor.float().contiguous()} if needed else {}


def _notes(plan: Plan, chosen: dict[str, int]) -> list[str]:
    notes = []
    if plan.keep:
        notes.append("fireq: the checkpoint's own low-bit weights were kept, bit for bit")
    if plan.config.kv_bits == 16 and (plan.config.pre_rope or plan.config.post_rope_top_k):
        notes.append("fireq: no RoPE-aware scaling, since keys are kept in 16 bits")
    notes += [f"fireq: search chose {choice} in {count} layers" for choice, count in sorted(chosen.items())]
    return notes
