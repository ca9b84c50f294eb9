# SPDX-License-Identifier: Apache-2.0
"""RoPE-aware scaling of queries and keys, so that keys survive INT4 (FireQ, spec section 4).

The rotation turns the pair (i, i + D/2), the half-split convention of transformers. A scale that is
equal on both members commutes with it and may sit before (N, folded into weights at no cost) or
after; one that differs (S) must be applied after the rotation, online, to keys and inversely to queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewright.capture import Batch, Site, observe
from tilewright.models.config import LlamaConfig
from tilewright.reducers import AbsMax


@dataclass(frozen=True)
class KeyRange:
    """What calibration saw of one layer's keys, per KV head.

    radius: r [H_kv, D/2], max over tokens of sqrt(k_i^2 + k_{i+D/2}^2), which the rotation keeps.
    magnitude: m [H_kv, D], max over tokens of |k_c| after the rotation.
    """

    radius: Tensor
    magnitude: Tensor


@dataclass(frozen=True)
class KeyScales:
    """pre: N [H_kv, D/2], the factor of both members of a pair. post: S [H_kv, D], applied after RoPE."""

    pre: Tensor
    post: Tensor

    @property
    def combined(self) -> Tensor:
        """[H_kv, D]: N and S as one factor after the rotation."""
        return torch.cat((self.pre, self.pre), -1) * self.post


def rotate(x: Tensor, config: LlamaConfig) -> Tensor:
    """RoPE of x [B, T, H, D] at positions 0 .. T-1."""
    half = config.head_dim // 2
    position = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
    angle = torch.outer(position, config.rope_frequencies().to(x.device))[:, None]
    gain = config.rotation_gain
    cos, sin = (angle.cos() * gain).to(x.dtype), (angle.sin() * gain).to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def key_magnitudes(config: LlamaConfig) -> Callable[[Tensor], Tensor]:
    """Transform of a k_proj output [B, T, H_kv D] to [B, T, H_kv, D/2 + D]: pair radius, |k| after RoPE."""

    def transform(k: Tensor) -> Tensor:
        k = rotate(k.float().unflatten(-1, (config.num_key_value_heads, config.head_dim)), config)
        first, second = k.chunk(2, -1)
        return torch.cat((torch.hypot(first, second), k.abs()), -1)

    return transform


def key_site(config: LlamaConfig) -> Site:
    """The key projections of all layers, seen through :func:`key_magnitudes`."""
    return Site("model.layers.*.self_attn.k_proj", transform=key_magnitudes(config))


def split_range(seen: Tensor, config: LlamaConfig) -> KeyRange:
    """AbsMax over :func:`key_magnitudes` [H_kv, D/2 + D] to a KeyRange."""
    half = config.head_dim // 2
    return KeyRange(seen[:, :half], seen[:, half:])


def calibrate_keys(module: nn.Module, config: LlamaConfig, batches: Iterable[Batch]) -> list[KeyRange]:
    """Run the model over batches; the range of each layer's keys.

    Raises:
        ValueError: as :func:`tilewright.capture.observe`.
    """
    site = key_site(config)
    seen = observe(module, batches, {site: AbsMax}, description="calibrating keys")
    return [split_range(value, config) for value in seen.values()]


def key_scales(seen: KeyRange, *, pre: bool = True, top_k: int = 8, alpha: float = 8.0, beta: float = 8.0) -> KeyScales:
    """Scales of one layer from its calibrated range.

    S = beta / m on the ``top_k`` largest channels of each head and their rotation partners (each with
    its own m), 1 elsewhere. N = alpha / r on all other pairs, 1 on affected ones. ``pre=False``: N = 1;
    ``top_k=0``: S = 1. A channel or pair that is always 0 keeps 1.

    Raises:
        ValueError: top_k exceeds the head size.
    """
    heads, d = seen.magnitude.shape
    if not 0 <= top_k <= d:
        raise ValueError(f"top_k={top_k}: the head has {d} channels")
    affected = torch.zeros(heads, d // 2, dtype=torch.bool)
    affected.scatter_(1, seen.magnitude.topk(top_k, dim=1).indices % (d // 2), True)
    both = torch.cat((affected, affected), -1)
    post = torch.where(both & (seen.magnitude > 0), beta / seen.magnitude, torch.ones(()))
    scaled = ~affected & (seen.radius > 0) & pre
    return KeyScales(torch.where(scaled, alpha / seen.radius, torch.ones(())), post)


def scale_rows(weights: MutableMapping[str, Tensor], prefix: str, pre: Tensor, config: LlamaConfig) -> None:
    """Fold N into one layer: rows of W_k (and its bias) times N, rows of W_q of the group's heads by 1/N.

    ``weights`` holds float tensors by name; ``prefix`` is ``model.layers.<i>.self_attn.``.
    """
    group = config.num_attention_heads // config.num_key_value_heads
    keys = torch.cat((pre, pre), -1)
    queries = 1 / keys.repeat_interleave(group, 0)
    for name, factor in (("k_proj", keys.flatten()), ("q_proj", queries.flatten())):
        weights[f"{prefix}{name}.weight"] = weights[f"{prefix}{name}.weight"] * factor[:, None]
        if f"{prefix}{name}.bias" in weights:
            weights[f"{prefix}{name}.bias"] = weights[f"{prefix}{name}.bias"] * factor
