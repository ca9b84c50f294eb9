# SPDX-License-Identifier: Apache-2.0
"""Linear attention on the device, forward: the delta rule, Lightning Attention, their relatives; prefill and decoding.

Peers: flash-linear-attention's Triton kernels, where it is installed, and for decoding a copy of the states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cuda.cases import GpuCase, Methods
from tilewright.ops import linear_attention, linear_attention_step_

CHUNK = 64


@dataclass(frozen=True)
class Shape:
    """A call of the chunk form: rule, decay and sizes; `sequences` packed into one row."""

    name: str
    rule: Any
    decay: str
    tokens: int
    heads: int
    value_heads: int
    size: int = 128
    sequences: int = 1
    peer: bool = False  # Triton compiles for a minute

    @property
    def bytes(self) -> int:
        """q, k, v and o, each once, and the gates."""
        gates = {"none": 0, "head": 0, "token": 4, "channel": 4 * self.size}[self.decay] + 4 * (self.rule == "delta")
        return self.tokens * (2 * self.size * (2 * self.heads + 2 * self.value_heads) + gates * self.value_heads)

    @property
    def operations(self) -> float:
        """Of the chunk form at 64 tokens, masks counted in full."""
        square = 2.0 * CHUNK * self.size
        products = (3 if self.rule == "delta" else 2) * 2.0 * self.size**2
        squares = (4 if self.rule == "delta" else 2) * square
        return self.tokens * self.value_heads * (products + squares)


SHAPES = [
    Shape("gated_delta_rule_1x8192_16_64", "delta", "token", 8192, 16, 64),
    Shape("gated_delta_rule_1x32768_16_64", "delta", "token", 32768, 16, 64),
    Shape("lightning_1x8192_64", "additive", "head", 8192, 64, 64),
    Shape("kda_1x8192_64", "delta", "channel", 8192, 64, 64),
    Shape("gated_delta_rule_1x32768_4_16", "delta", "token", 32768, 4, 16),
    Shape("gated_delta_rule_packed_4x8192_16_64", "delta", "token", 32768, 16, 64, sequences=4),
    Shape("gated_delta_rule_1x131072_2_4", "delta", "token", 131072, 2, 4),
    Shape("delta_rule_1x8192_32", "delta", "none", 8192, 32, 32),
    Shape("lightning_1x1024_64", "additive", "head", 1024, 64, 64),
    Shape("lightning_1x131072_16", "additive", "head", 131072, 16, 16),
    Shape("gla_1x8192_32", "additive", "channel", 8192, 32, 32),
    Shape("gated_delta_rule_1x1024_16_64", "delta", "token", 1024, 16, 64),
    Shape("gated_delta_rule_1x131072_16_64", "delta", "token", 131072, 16, 64),
]
BESIDE_PEERS = [
    Shape("gated_delta_rule_1x8192_16_64_fla", "delta", "token", 8192, 16, 64, peer=True),
    Shape("lightning_1x8192_64_fla", "additive", "head", 8192, 64, 64, peer=True),
    Shape("kda_1x8192_64_fla", "delta", "channel", 8192, 64, 64, peer=True),
]


def inputs_of(shape: Shape) -> dict[str, Any]:
    """Random bfloat16 inputs with keys of unit length; float32 gates."""
    rng = torch.Generator(device="cuda").manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, shape.tokens, heads, shape.size, generator=rng, device="cuda").bfloat16()

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=rng, device="cuda")

    x = {"q": normal(shape.heads), "v": normal(shape.value_heads)}
    x["k"] = torch.nn.functional.normalize(normal(shape.heads).float(), dim=-1).bfloat16()
    by_token = (1, shape.tokens, shape.value_heads)
    if shape.rule == "delta":
        x["beta"] = uniform(*by_token)
    if shape.decay == "head":
        x["g"] = -uniform(shape.value_heads) / 8
    elif shape.decay == "token":
        x["g"] = -uniform(*by_token) / 8
    elif shape.decay == "channel":
        x["g"] = -uniform(*by_token, shape.size) / 8
    if shape.sequences > 1:
        step = shape.tokens // shape.sequences
        x["cu_seqlens"] = torch.arange(0, shape.tokens + 1, step, device="cuda")
    return x


def fla_call(shape: Shape, x: dict[str, Any]) -> Callable[[], Any] | None:
    """The same call in flash-linear-attention, with heads of queries repeated where it takes no groups."""
    try:
        if shape.decay == "channel" and shape.rule == "delta":
            from fla.ops.kda import chunk_kda as call
        elif shape.decay == "channel":
            from fla.ops.gla import chunk_gla as call
        elif shape.rule == "delta" and shape.decay == "token":
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule as call
        elif shape.rule == "delta":
            from fla.ops.delta_rule import chunk_delta_rule as call
        else:
            from fla.ops.simple_gla import chunk_simple_gla as call
    except ImportError:
        return None
    y = dict(x)
    group = shape.value_heads // shape.heads
    if group > 1 and not (shape.rule == "delta" and shape.decay == "token"):
        y["q"], y["k"] = (y[n].repeat_interleave(group, dim=2) for n in ("q", "k"))
    if shape.decay == "head":
        y["g_gamma"] = y.pop("g")
    if "beta" in y:
        y["beta"] = y["beta"].bfloat16()
    return partial(call, **y)


def forward_methods(shape: Shape) -> Methods:
    x = inputs_of(shape)
    methods: Methods = {"tilewright": partial(linear_attention, **x, rule=shape.rule)}
    if shape.peer and (fla := fla_call(shape, x)) is not None:
        methods["fla"] = fla
    return methods


@dataclass(frozen=True)
class Decode:
    """One token a sequence."""

    name: str
    rule: Any
    decay: str
    batch: int
    heads: int
    value_heads: int
    size: int = 128

    @property
    def state_bytes(self) -> int:
        return 4 * self.batch * self.value_heads * self.size**2

    @property
    def copies(self) -> int:
        """So many pools of states that the last-level cache of 50 MB holds none at its next use."""
        return max(2, -(-150_000_000 // self.state_bytes)) if self.state_bytes < 150_000_000 else 1


DECODES = [
    Decode("lightning_step_64_64", "additive", "head", 64, 64, 64),
    Decode("gated_delta_rule_step_32_8_16", "delta", "token", 32, 8, 16),
    Decode("gated_delta_rule_step_1_16_32", "delta", "token", 1, 16, 32),
    Decode("gated_delta_rule_step_256_8_16", "delta", "token", 256, 8, 16),
    Decode("kda_step_64_32", "delta", "channel", 64, 32, 32),
]


def decode_methods(decode: Decode) -> Methods:
    """The step in place, and a copy of as many bytes as it reads and writes."""
    shape = Shape("", decode.rule, decode.decay, decode.batch, decode.heads, decode.value_heads, decode.size)
    x = {n: t if t.dim() == 1 else t.transpose(0, 1).contiguous() for n, t in inputs_of(shape).items()}
    sizes = (decode.batch, decode.value_heads, decode.size, decode.size)
    pools = [torch.randn(sizes, device="cuda") for _ in range(decode.copies)]
    turns = {name: itertools.cycle(pools) for name in ("step", "copy")}
    targets = itertools.cycle(pools[1:] + pools[:1] if len(pools) > 1 else [torch.empty_like(pools[0])])

    def step() -> Tensor:
        with torch.no_grad():
            return linear_attention_step_(
                x["q"], x["k"], x["v"], next(turns["step"]), beta=x.get("beta"), g=x.get("g"), rule=decode.rule
            )

    def copy() -> Tensor:
        return next(targets).copy_(next(turns["copy"]))

    return {"tilewright": step, "copy of the states": copy}


def forward_case(shape: Shape) -> GpuCase:
    make = partial(forward_methods, shape)
    return GpuCase(f"linear_attention/{shape.name}", make, shape.bytes, shape.operations, calls=2, note="forward")


def decode_case(decode: Decode) -> GpuCase:
    return GpuCase(
        f"linear_attention/{decode.name}",
        partial(decode_methods, decode),
        2 * decode.state_bytes,
        6.0 * decode.batch * decode.value_heads * decode.size**2,
        calls=max(8, decode.copies),
        note="one token a sequence, states in place",
    )


def cases() -> list[GpuCase]:
    """The shapes that the papers' and the kernels' authors report, then decoding, then what takes long to start."""
    first, rest = SHAPES[:4], SHAPES[4:]
    return [
        *map(forward_case, first),
        *map(decode_case, DECODES),
        *map(forward_case, rest),
        *map(forward_case, BESIDE_PEERS),
    ]
