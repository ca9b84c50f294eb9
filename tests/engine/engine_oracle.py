# SPDX-License-Identifier: Apache-2.0
"""The engine's model in float64 torch, with the same rounding of activations, queries and cache.

Rounding is discontinuous: where a value lies within float32 noise of a boundary, engine and oracle may pick different
neighbours, and everything after differs by a step of the grid. The oracle therefore also gives a bound: how far its own
logits move when every rounded tensor is first disturbed by noise larger than the engine's arithmetic error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from engine_models import dense
from torch import Tensor

from tilewright.formats.int8 import Int8Weight
from tilewright.models import LanguageModel
from tilewright.reference.low_bit import round_e4m3

# float32 sums of up to 128 products, twice: below 2^-24 * 128^(1/2) * a few; 2^-18 is 60 units in the last place.
ARITHMETIC_NOISE = 2.0**-18
# A level that multiplies attention weights as bfloat16 rounds each of them to 2^-9.
BFLOAT16_NOISE = 2.0**-9


@dataclass(frozen=True)
class Formats:
    act: str = "int8"
    kv: str = "int4"
    query: str = "fp8"
    scale_group: int = 0


class Oracle:
    def __init__(self, model: LanguageModel, formats: Formats) -> None:
        self.config, self.formats = model.config, formats
        self.int8_head = isinstance(model.weights[model.output_name], Int8Weight)
        self.int4_head = not self.int8_head and not isinstance(model.weights[model.output_name], Tensor)
        self.output = model.output_name
        self.weights = {name: dense(weight) for name, weight in model.weights.items()}
        self.maps = {name: [part.double() for part in one.affine()] for name, one in model.maps.items()}
        self.noise = 0.0
        self.attention_noise = 0.0
        self.generator = torch.Generator().manual_seed(7)

    def logits(self, ids: list[int]) -> Tensor:
        """float64 [T, V]."""
        c = self.config
        x = self._mapped("model.embed_tokens", self.weights["model.embed_tokens.weight"][torch.tensor(ids)])
        for index in range(c.num_hidden_layers):
            p = f"model.layers.{index}."
            attended = self._attention(self._norm(x, p + "input_layernorm.weight"), p + "self_attn.")
            x = x + self._mapped(p + "self_attn", attended)
            h = self._norm(x, p + "post_attention_layernorm.weight")
            gate, up = self._linear(h, p + "mlp.gate_proj"), self._linear(h, p + "mlp.up_proj")
            x = x + self._mapped(p + "mlp", self._linear(gate * torch.sigmoid(gate) * up, p + "mlp.down_proj"))
            x = self._mapped(p.removesuffix("."), x)
        x = self._norm(x, "model.norm.weight")
        if self.int8_head:
            scale = x.abs().amax(-1, keepdim=True) / 32512
            x = (self._disturb(x) / scale).round() * scale
        elif self.int4_head:
            x = self._round_activation(x)
        return x @ self.weights[self.output].T

    def bound(self, ids: list[int], exact: Tensor, attention_noise: float = ARITHMETIC_NOISE) -> float:
        """Three times the largest relative distance that noise moves the logits, over four draws."""
        self.noise, self.attention_noise = ARITHMETIC_NOISE, attention_noise
        moved = [distance(self.logits(ids), exact) for _ in range(4)]
        self.noise = self.attention_noise = 0.0
        return 3 * max(moved)

    def _disturb(self, x: Tensor, noise: float | None = None) -> Tensor:
        noise = self.noise if noise is None else noise
        if noise == 0.0:
            return x
        return x + noise * x.abs().amax(-1, keepdim=True) * torch.randn(
            x.shape, generator=self.generator, dtype=x.dtype
        )

    def _norm(self, x: Tensor, name: str) -> Tensor:
        y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * self.weights[name]
        return self._mapped(name.removesuffix(".weight"), y)

    def _mapped(self, place: str, x: Tensor) -> Tensor:
        """Through the activation map there, if there is one."""
        if place not in self.maps:
            return x
        factor, summand = self.maps[place]
        return factor * x + summand

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = self._round_activation(x) @ self.weights[name + ".weight"].T
        return self._mapped(name, y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y)

    def _round_activation(self, x: Tensor) -> Tensor:
        x = self._disturb(x)
        if self.formats.act != "int8":
            scale = x.abs().amax(-1, keepdim=True) / 448
            return round_e4m3(x / scale) * scale
        group = self.formats.scale_group or x.shape[-1]
        pieces = []
        for piece in x.split(group, dim=-1):
            scale = piece.abs().amax(-1, keepdim=True) / 127
            pieces.append((piece / scale).round() * scale)
        return torch.cat(pieces, dim=-1)

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        c = self.config
        heads = lambda y: y.unflatten(-1, (-1, c.head_dim)).transpose(0, 1)  # noqa: E731
        q, k, v = (heads(self._linear(x, prefix + name)) for name in ("q_proj", "k_proj", "v_proj"))
        group = c.num_attention_heads // c.num_key_value_heads
        q, k = self._rotate(q), self._rotate(k)
        if prefix + "key_scale" in self.weights:
            scale = self.weights[prefix + "key_scale"][:, None]
            k = k * scale
            q = q / scale.repeat_interleave(group, 0)
        if self.formats.query == "fp8":
            q = self._disturb(q)
            scale = q.abs().amax(-1, keepdim=True) / 448
            q = round_e4m3(q / scale) * scale
        k, v = self._round_cache(k), self._round_cache(v)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(c.head_dim)
        position = torch.arange(x.shape[0])
        hidden = position[None, :] > position[:, None]
        if c.sliding_window is not None:
            hidden |= position[None, :] <= position[:, None] - c.sliding_window
        out = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1) @ v
        out = self._disturb(out, self.attention_noise)
        return self._linear(out.transpose(0, 1).flatten(1), prefix + "o_proj")

    def _rotate(self, x: Tensor) -> Tensor:
        # The angle is a float32 product, as in transformers.
        position = torch.arange(x.shape[1], dtype=torch.float32)
        angle = (position[:, None] * self.config.rope_frequencies()).double()
        cos, sin = angle.cos() * self.config.rotation_gain, angle.sin() * self.config.rotation_gain
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    def _round_cache(self, x: Tensor) -> Tensor:
        x = self._disturb(x)
        if self.formats.kv == "bf16":
            return x.to(torch.bfloat16).double()
        pieces = []
        for piece in x.split(128, dim=-1):
            scale = (piece.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 7).float().double()
            pieces.append((piece / scale).round().clamp(-7, 7) * scale)
        return torch.cat(pieces, dim=-1)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2."""
    return float((a.double() - b).norm() / b.norm())
