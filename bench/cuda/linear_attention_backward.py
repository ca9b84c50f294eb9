# SPDX-License-Identifier: Apache-2.0
"""Gradients of linear attention at the shapes of Qwen3-Next (Gated DeltaNet) and of Lightning Attention layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cuda.cases import GpuCase, Methods
from tilewright.ops import linear_attention

KEY = VALUE = 128
CHUNK = 64


@dataclass(frozen=True)
class Shape:
    """rule and decay name the operator; value_heads heads of values share `heads` heads of queries and keys."""

    name: str
    rule: str
    decay: str
    batch: int
    tokens: int
    heads: int
    value_heads: int
    packed: tuple[int, ...] = ()
    peer: bool = False


SHAPES = (
    Shape("gated_delta", "delta", "token", 1, 8192, 16, 32),
    Shape("gated_delta", "delta", "token", 1, 32768, 16, 32),
    Shape("gated_delta", "delta", "token", 1, 8192, 16, 64),
    Shape("gated_delta", "delta", "token", 1, 4096, 16, 32, (0, 410, 841, 1135, 2126, 2512, 4096)),
    Shape("lightning", "additive", "head", 1, 8192, 64, 64),
    Shape("kimi_delta", "delta", "channel", 1, 8192, 32, 32),
    # Last: compiling the peer takes its time. Its gated gradient refuses the Triton of current releases on Hopper.
    Shape("delta", "delta", "none", 4, 2048, 16, 16, peer=True),
)


def inputs_of(s: Shape) -> dict[str, Any]:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    keys = torch.nn.functional.normalize(normal(s.batch, s.tokens, s.heads, KEY), dim=-1)
    gates = torch.rand(s.batch, s.tokens, s.value_heads, device="cuda")
    channels = torch.rand(s.batch, s.tokens, s.value_heads, KEY, device="cuda") if s.decay == "channel" else gates
    decays = {"none": None, "head": -0.1 * torch.rand(s.value_heads, device="cuda"), "token": -0.1 * gates}
    decays["channel"] = -0.1 * channels
    return {
        "q": normal(s.batch, s.tokens, s.heads, KEY),
        "k": keys,
        "v": normal(s.batch, s.tokens, s.value_heads, VALUE),
        "beta": gates if s.rule == "delta" else None,
        "g": decays[s.decay],
        "cu_seqlens": torch.tensor(s.packed, device="cuda") if s.packed else None,
    }


def differentiable(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def forward_and_backward(forward: Callable[[], Tensor], leaves: list[Tensor], d_out: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(forward(), leaves, d_out)


def gradient(s: Shape, x: dict[str, Any], d_out: Tensor) -> Callable[[], Any]:
    """Our operator itself: autograd would run it on the stream of its forward pass, which is not the one captured."""
    sequences = len(s.packed) - 1 if s.packed else s.batch
    states = torch.zeros(sequences, s.value_heads, KEY, VALUE, device="cuda")
    fixed = {name: t.detach() if isinstance(t, Tensor) else t for name, t in x.items()}
    operator = torch.ops.tilewright.linear_attention_backward
    return lambda: operator(
        *fixed.values(), states, fixed["v"], d_out, states, KEY**-0.5, s.rule == "delta"
    )  # fmt: skip


def fla_forward(x: dict[str, Any]) -> Callable[[], Tensor] | None:
    """flash-linear-attention's plain delta rule, where it is installed."""
    try:
        from fla.ops.delta_rule import chunk_delta_rule
    except ImportError:
        return None
    q, k, v, beta = (x[name] for name in ("q", "k", "v", "beta"))
    narrow = beta.to(torch.bfloat16)
    return lambda: chunk_delta_rule(q, k, v, narrow)[0]


def methods(s: Shape, with_forward: bool) -> Methods:
    x = differentiable(inputs_of(s))
    leaves = [t for t in x.values() if isinstance(t, Tensor) and t.requires_grad]
    d_out = torch.randn_like(x["v"])

    def ours() -> Tensor:
        return linear_attention(**x, rule=s.rule)[0]  # type: ignore[arg-type]

    found: Methods = {
        "tilewright": forward_and_backward(ours, leaves, d_out) if with_forward else gradient(s, x, d_out)
    }
    peer = fla_forward(x) if s.peer and with_forward else None
    if peer is not None:
        found["fla"] = forward_and_backward(peer, leaves, d_out)
    return found


def operations(s: Shape) -> float:
    """Of the gradient alone: products with the state, and those of a chunk's tokens with each other."""
    state, pairs = (7, 10) if s.rule == "delta" else (4, 5)
    by_token = 2 * state * KEY * VALUE + 2 * pairs * CHUNK * KEY
    return float(s.batch * s.tokens * s.value_heads * by_token)


def traffic(s: Shape) -> int:
    """q, k, v, dO read, and dq, dk, dv written, two bytes an element."""
    return 2 * s.batch * s.tokens * (4 * s.heads * KEY + 3 * s.value_heads * VALUE)


def title(s: Shape) -> str:
    packed = f"-packed{len(s.packed) - 1}" if s.packed else ""
    return f"{s.name}-{s.batch}x{s.tokens}-h{s.heads}-hv{s.value_heads}{packed}"


def case(s: Shape, with_forward: bool) -> GpuCase:
    return GpuCase(
        name=f"linear_attention_backward-{title(s)}{'-with-forward' if with_forward else ''}",
        make=lambda: methods(s, with_forward),
        bytes=traffic(s) * (2 if with_forward else 1),
        operations=operations(s) * (1.5 if with_forward else 1.0),
        calls=2,
        note="K = V = 128, bf16",
    )


def cases() -> list[GpuCase]:
    return [case(s, with_forward) for s in SHAPES for with_forward in (False, True)]
