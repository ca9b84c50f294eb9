# SPDX-License-Identifier: Apache-2.0
"""What CATS is compared with, in one form: a criterion says which neurons of an MLP a token keeps.

:func:`sparsified` runs a model with the products of all others set to zero, by dense products: for quality, not for
speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tilewright.nn.cats_mlp import activation
from tilewright.sparsify.mlps import GatedMLP, Names, gated_mlps
from tilewright.sparsify.quantiles import check_share
from tilewright.sparsify.thresholds import Thresholds


@dataclass(frozen=True)
class Neurons:
    """One MLP's neurons for some tokens: gate activations a [..., M] in float32, and h = a * (W_up x), the input of
    W_down."""

    mlp: GatedMLP
    z: Tensor
    a: Tensor
    h: Tensor


Criterion = Callable[[Neurons], Tensor]
"""bool [..., M]: what is kept."""


def thresholded(thresholds: Thresholds) -> Criterion:
    """CATS, a global threshold (FAT), the norm-weighted score, or (score "hidden") the output's size, CETT's
    criterion."""
    which = thresholds.score

    def keep(n: Neurons) -> Tensor:
        value = n.a if which == "gate" else n.h
        return ~(value.abs() < thresholds[n.mlp.name].to(value.device))

    return keep


def top_k(sparsity: float) -> Criterion:
    """Each token keeps its (1 - sparsity) M largest |a_j|; of equal ones the first."""
    share = check_share(sparsity)

    def keep(n: Neurons) -> Tensor:
        count = n.a.shape[-1] - round(share * n.a.shape[-1])
        best = n.a.abs().topk(count, dim=-1).indices
        return torch.zeros_like(n.a, dtype=torch.bool).scatter_(-1, best, True)

    return keep


def random_mask(sparsity: float, seed: int = 0) -> Criterion:
    """Each neuron of each token is dropped with probability ``sparsity``."""
    share, generator = check_share(sparsity), torch.Generator().manual_seed(seed)
    return lambda n: (torch.rand(n.a.shape, generator=generator) >= share).to(n.a.device)


def relu_swap() -> Criterion:
    """Only neurons with a positive gate; with :func:`sparsified`'s ``act="relu"`` it is ReLUfication."""
    return lambda n: n.z > 0


class _Masked(nn.Module):
    def __init__(self, mlp: GatedMLP, keep: Criterion, act: str | None) -> None:
        super().__init__()
        self.mlp, self.keep = mlp, keep
        self.act = act or mlp.act
        self.inner = mlp.module  # parameters stay where they were
        self.kept = self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        up = self.mlp.up(x)
        z = self.mlp.gate(x).float()
        a = activation(self.act, z)  # type: ignore[arg-type]
        h = a * up.float()
        kept = self.keep(Neurons(self.mlp, z, a, h))
        self.kept += int(kept.sum())
        self.seen += kept.numel()
        out: Tensor = self.mlp.down(torch.where(kept, h, 0.0).to(up.dtype))
        return out


class Kept:
    """What a :func:`sparsified` model has kept so far."""

    def __init__(self, layers: dict[str, _Masked]) -> None:
        self._layers = layers

    def sparsity(self) -> dict[str, float]:
        """Share of neurons dropped, by MLP."""
        return {name: 1 - one.kept / max(one.seen, 1) for name, one in self._layers.items()}

    def mean(self) -> float:
        """Over all."""
        shares = self.sparsity()
        return sum(shares.values()) / len(shares)


@contextlib.contextmanager
def sparsified(
    model: nn.Module,
    keep: Criterion,
    *,
    act: str | None = None,
    names: Names | Mapping[str, Names] | None = None,
) -> Iterator[Kept]:
    """While the context lives, ``model`` computes its MLPs with only those neurons; yields what is kept.

    act: another activation than the model's ("relu": ReLUfication).
    """
    mlps = gated_mlps(model, names)
    masked = {name: _Masked(mlp, keep, act) for name, mlp in mlps.items()}
    try:
        for name, module in masked.items():
            _place(model, name, module)
        yield Kept(masked)
    finally:
        for name, mlp in mlps.items():
            _place(model, name, mlp.module)


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).register_module(child, module)
