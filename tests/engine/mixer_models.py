# SPDX-License-Identifier: Apache-2.0
"""Small models whose layers have linear attention, and the same layers in torch, token by token."""

from __future__ import annotations

import math
from typing import Any

import torch
from engine_models import engine_model
from engine_oracle import Formats, Oracle
from torch import Tensor

from tilewright.formats import Int4Weight
from tilewright.formats.int8 import Int8Weight
from tilewright.models import LanguageModel
from tilewright.models.mixers import HeadMap, LinearMixer, Window

HEADS, KV_HEADS, SIZE = 4, 2, 16
LIGER = LinearMixer(
    query=HeadMap("softmax"),
    key=HeadMap("softmax"),
    gate=HeadMap("log_sigmoid", factor=1 / 16),
    window=Window(6),
)
HGRN2 = LinearMixer(
    query=HeadMap("softmax"),
    key=HeadMap("complement"),
    gate=HeadMap("log_sigmoid"),
    window=Window(5, linear_factor=0.3, window_factor=0.9),
)
HEDGEHOG = LinearMixer(
    query=HeadMap("softmax_pair", weight="phi_q.weight"),
    key=HeadMap("softmax_pair", weight="phi_k.weight", heads=HEADS),
    after_rotation=True,
    normalize=True,
    eps=1e-12,
)
HEDGEHOG_WINDOW = LinearMixer(
    query=HeadMap("exp_pair", weight="phi_q.weight", bias="phi_q.bias"),
    key=HeadMap("exp_pair", weight="phi_k.weight", bias="phi_k.bias"),
    after_rotation=True,
    normalize=True,
    eps=1e-12,
    window=Window(7, mix="mix"),
)


def plain(function: Any, **options: Any) -> LinearMixer:
    return LinearMixer(HeadMap(function), HeadMap(function, **options), scale=SIZE**-0.5)


MIXERS: dict[str, LinearMixer] = {
    "liger": LIGER,
    "hgrn2": HGRN2,
    "hedgehog": HEDGEHOG,
    "hedgehog_window": HEDGEHOG_WINDOW,
    "shared_map": LinearMixer(
        query=HeadMap("joint_softmax", weight="phi_q.weight"),
        key=HeadMap("joint_softmax", weight="phi_k.weight"),
        normalize=True,
    ),
    "capped": LinearMixer(HeadMap("capped_exp_pair", cap=0.7), HeadMap("capped_exp_pair", cap=0.9), normalize=True),
    "elu": LinearMixer(HeadMap("elu"), HeadMap("elu"), normalize=True, after_rotation=True, eps=0.1),
    "relu": plain("relu"),
    "silu": plain("silu", factor=0.5),
    "unit_norm": plain("unit_norm"),
    "sigmoid": plain("sigmoid"),
    "window_alone": LinearMixer(HeadMap("softmax"), HeadMap("softmax"), window=Window(1, None, 0.0, 1.0)),
    "wide_window": LinearMixer(
        HeadMap("elu"), HeadMap("elu"), normalize=True, after_rotation=True, eps=1e-12, window=Window(33, mix="mix")
    ),
}
_SHAPES = {
    "hedgehog": {"phi_q.weight": (HEADS, SIZE, SIZE), "phi_k.weight": (HEADS, SIZE, SIZE)},
    "hedgehog_window": {
        "phi_q.weight": (HEADS, SIZE, 9),
        "phi_k.weight": (KV_HEADS, SIZE, 9),
        "phi_q.bias": (HEADS, 9),
        "phi_k.bias": (1, 9),
    },
    "shared_map": {"phi_q.weight": (1, SIZE, 20), "phi_k.weight": (1, SIZE, 20)},
}


def mixer_model(kind: str, layers: tuple[int, ...] = (0, 1), low_bit: bool = False, **options: Any) -> LanguageModel:
    """A model with the mixer `kind` in the layers named; its matrices are bfloat16 unless `low_bit`."""
    model = engine_model(**({} if low_bit else {"head": "bf16"}), **options)
    generator = torch.Generator().manual_seed(17)
    for index in layers:
        prefix = f"model.layers.{index}.self_attn."
        for name, shape in _SHAPES.get(kind, {}).items():
            model.weights[prefix + name] = 0.4 * torch.randn(shape, generator=generator)
        if "window" in kind and (window := MIXERS[kind].window) is not None and window.mix is not None:
            model.weights[prefix + "mix"] = torch.rand(HEADS, generator=generator) + 0.1
        model.mixers[index] = _named(MIXERS[kind], prefix)
    if not low_bit:
        for name, weight in model.weights.items():
            if isinstance(weight, Int4Weight | Int8Weight):
                model.weights[name] = weight.dequantize(torch.bfloat16)
    return model


def _named(mixer: LinearMixer, prefix: str) -> LinearMixer:
    def full(spec: HeadMap) -> HeadMap:
        names = {name: prefix + value for name in ("weight", "bias") if (value := getattr(spec, name)) is not None}
        return HeadMap(**(vars(spec) | names))

    window = mixer.window
    if window is not None and window.mix is not None:
        window = Window(**(vars(window) | {"mix": prefix + window.mix}))
    return LinearMixer(**(vars(mixer) | {"query": full(mixer.query), "key": full(mixer.key), "window": window}))


class MixerOracle(Oracle):
    """The model with these mixers; float matrices meet activations that are not rounded."""

    def __init__(self, model: LanguageModel, formats: Formats, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(model, formats)
        self.mixers = model.mixers
        self.rounds = any(isinstance(weight, Int4Weight) for weight in model.weights.values())
        self.weights = {name: weight.to(dtype) for name, weight in self.weights.items()}

    def _round_activation(self, x: Tensor) -> Tensor:
        return super()._round_activation(x) if self.rounds else x

    def _rotate(self, x: Tensor) -> Tensor:
        return super()._rotate(x).to(x.dtype)

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        mixer = self.mixers.get(int(prefix.split(".")[2]))
        if mixer is None:
            return super()._attention(x, prefix)
        q, k, v = (self._linear(x, prefix + name).unflatten(-1, (-1, SIZE)) for name in ("q_proj", "k_proj", "v_proj"))
        turned_q, turned_k = (self._rotate(y.transpose(0, 1)).transpose(0, 1) for y in (q, k))
        v = v.repeat_interleave(HEADS // KV_HEADS, 1)
        seen = (turned_q, turned_k) if mixer.after_rotation else (q, k)
        features_q, features_k = self._map(mixer.query, seen[0]), self._map(mixer.key, seen[1])
        gate = None if mixer.gate is None else self._map(mixer.gate, k)
        size = 0 if mixer.window is None else mixer.window.size
        shared = mixer.window is not None and mixer.window.mix is not None
        linear, weights = _linear(features_q, features_k, v, gate, size if shared else 0)
        linear, weights = mixer.scale * linear, mixer.scale * weights
        window = None if mixer.window is None else _window(turned_q, turned_k, v, size)
        if shared:
            assert mixer.window is not None
            assert mixer.window.mix is not None
            assert window is not None
            mix = self.weights[mixer.window.mix][:, None]
            out = (linear + mix * window[0]) / (weights + mix * window[1] + mixer.eps)
        else:
            out = linear / (weights + mixer.eps) if mixer.normalize else linear
            if mixer.window is not None and window is not None:
                out = mixer.window.linear_factor * out + mixer.window.window_factor * (window[0] / window[1])
        return self._linear(self._disturb(out.flatten(1), self.attention_noise), prefix + "o_proj")

    def _map(self, spec: HeadMap, x: Tensor) -> Tensor:
        """[T, h, D] to [T, HEADS, F]."""
        heads = x.shape[1] if spec.heads is None else spec.heads
        y = x.repeat_interleave(heads // x.shape[1], 1)
        if spec.weight is not None:
            weight = self.weights[spec.weight]
            y = torch.einsum("thd,hdf->thf", y, weight.expand(heads, -1, -1))
        if spec.bias is not None:
            y = y + self.weights[spec.bias]
        return spec.factor * _FUNCTIONS[spec.function](y, spec.cap).repeat_interleave(HEADS // heads, 1)


_FUNCTIONS: dict[str, Any] = {
    "softmax": lambda y, _: torch.softmax(y, -1),
    "softmax_pair": lambda y, _: torch.cat((torch.softmax(y, -1), torch.softmax(-y, -1)), -1).clamp_min(1e-12),
    "exp_pair": lambda y, _: torch.cat((y - y.amax(-1, keepdim=True), y.amin(-1, keepdim=True) - y), -1).exp(),
    "capped_exp_pair": lambda y, cap: torch.cat((y.clamp(-cap, cap), -y.clamp(-cap, cap)), -1).exp(),
    "joint_softmax": lambda y, _: torch.softmax(torch.cat((2 * y, -2 * y), -1), -1).clamp_min(1e-12),
    "elu": lambda y, _: torch.nn.functional.elu(y) + 1,
    "relu": lambda y, _: y.relu(),
    "log_sigmoid": lambda y, _: torch.nn.functional.logsigmoid(y),
    "sigmoid": lambda y, _: torch.sigmoid(y),
    "complement": lambda y, _: torch.sigmoid(-y),
    "unit_norm": lambda y, _: y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
    "silu": lambda y, _: y * torch.sigmoid(y),
}


def _linear(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, late: int) -> tuple[Tensor, Tensor]:
    """Sums of values [T, H, V] and of weights [T, H, 1]; token j is written when token j + late is there."""
    v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    state = v.new_zeros(HEADS, k.shape[-1], v.shape[-1])
    out = []
    for t in range(q.shape[0]):
        if gate is not None:
            state = state * gate[t].exp()[..., None]
        if t >= late:
            state = state + k[t - late][..., None] * v[t - late][:, None]
        out.append(torch.einsum("hkv,hk->hv", state, q[t]))
    sums = torch.stack(out)
    return sums[..., :-1], sums[..., -1:]


def _window(q: Tensor, k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Likewise for softmax weights, relative to the largest of each row."""
    k = k.repeat_interleave(HEADS // k.shape[1], 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    distance = torch.arange(q.shape[0])[:, None] - torch.arange(q.shape[0])
    scores = scores.masked_fill((distance < 0) | (distance >= size), -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("hij,jhv->ihv", weights, v), weights.sum(-1).T[..., None]
