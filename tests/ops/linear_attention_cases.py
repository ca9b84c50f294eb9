# SPDX-License-Identifier: Apache-2.0
"""Inputs, oracles and derived tolerances shared by the tests of linear attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilewright.ops import linear_attention
from tilewright.reference.linear_attention import recurrence

RULES = ("additive", "delta")
DECAYS = ("none", "head", "token", "channel")


@dataclass(frozen=True)
class Inputs:
    """One call: leaves in `tensors` (None where the rule or decay has none), and what the gradient starts from."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    g: Tensor | None
    initial_state: Tensor
    d_out: Tensor
    d_state: Tensor
    rule: str
    cu_seqlens: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.beta, self.g, self.initial_state) if x is not None]

    def to(self, dtype: torch.dtype) -> Inputs:
        names = ("q", "k", "v", "beta", "g", "initial_state", "d_out", "d_state")
        return replace(self, **{n: None if (x := getattr(self, n)) is None else x.detach().to(dtype) for n in names})


def make(
    rule: str,
    decay: str,
    tokens: int,
    *,
    batch: int = 1,
    heads: int = 1,
    value_heads: int = 1,
    key: int = 16,
    value: int = 16,
    strength: float = 1.0,
    cu_seqlens: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Random inputs with keys of unit length, beta in (0, 2) and log decays in (-strength, 0)."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64).to(dtype)

    gates = {
        "none": lambda: None,
        "head": lambda: -strength * uniform(value_heads),
        "token": lambda: -strength * uniform(batch, tokens, value_heads),
        "channel": lambda: -strength * uniform(batch, tokens, value_heads, key),
    }
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    return Inputs(
        q=normal(batch, tokens, heads, key),
        k=torch.nn.functional.normalize(normal(batch, tokens, heads, key), dim=-1),
        v=normal(batch, tokens, value_heads, value),
        beta=2 * uniform(batch, tokens, value_heads) if rule == "delta" else None,
        g=gates[decay](),
        initial_state=normal(sequences, value_heads, key, value),
        d_out=normal(batch, tokens, value_heads, value),
        d_state=normal(sequences, value_heads, key, value),
        rule=rule,
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens),
    )


def run(inputs: Inputs, function: Callable[..., tuple[Tensor, Tensor | None]], **options: object) -> list[Tensor]:
    """Output, final state and the gradients of all leaves, by whatever computes the recurrence."""
    leaves = [x.detach().requires_grad_() for x in inputs.leaves()]
    rest = iter(leaves)
    q, k, v = next(rest), next(rest), next(rest)
    beta = next(rest) if inputs.beta is not None else None
    g = next(rest) if inputs.g is not None else None
    o, state = function(
        q,
        k,
        v,
        beta=beta,
        g=g,
        rule=inputs.rule,
        initial_state=next(rest),
        cu_seqlens=inputs.cu_seqlens,
        **options,
    )
    assert state is not None
    # A packed row behind the last sequence is zero and has no gradient.
    gradients = torch.autograd.grad(
        [o, state], leaves, [inputs.d_out.to(o.dtype), inputs.d_state.to(state.dtype)], allow_unused=True
    )
    return [o, state, *(torch.zeros_like(x) if d is None else d for d, x in zip(gradients, leaves, strict=True))]


def kernel(inputs: Inputs, mode: str = "chunk") -> list[Tensor]:
    return run(inputs, linear_attention, output_final_state=True, mode=mode)


def oracle(inputs: Inputs) -> list[Tensor]:
    return run(inputs.to(torch.float64), recurrence)


def names(inputs: Inputs) -> list[str]:
    gates = (["dbeta"] if inputs.beta is not None else []) + (["dg"] if inputs.g is not None else [])
    return ["o", "state", "dq", "dk", "dv", *gates, "dinitial"]


def relative(got: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """||got - wanted|| / max(||wanted||, floor); 0 for empty tensors."""
    got, wanted = got.detach().double(), wanted.detach().double()
    error = (got - wanted).norm()
    return 0.0 if wanted.numel() == 0 or error == 0 else float(error / wanted.norm().clamp(min=max(floor, 1e-300)))


def gate_floor(inputs: Inputs, results: list[Tensor]) -> float:
    """What dg is made of: sums of q dq and k dk over the later tokens of a chunk. Rounding errors scale with these."""
    dq, dk = results[2].detach().double(), results[3].detach().double()
    terms = ((inputs.q.double() * dq).abs() + (inputs.k.double() * dk).abs()).sum((2, 3))
    chunk = 32
    padded = torch.nn.functional.pad(terms, (0, -terms.shape[1] % chunk)).unflatten(1, (-1, chunk))
    later = padded.flip(-1).cumsum(-1)
    return float(later.sum() if inputs.g is not None and inputs.g.dim() == 1 else later.norm())


def assert_agrees(inputs: Inputs, got: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    """Every result within `bound` relative to its oracle, in the L2 norm."""
    for name, a, b in zip(names(inputs), got, wanted, strict=True):
        floor = gate_floor(inputs, wanted) if name == "dg" else 0.0
        error = relative(a, b, floor)
        assert error <= bound, f"{name}: relative error {error:.3g}, bound {bound:.3g}"
