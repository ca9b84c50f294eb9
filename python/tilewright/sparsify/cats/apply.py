# SPDX-License-Identifier: Apache-2.0
"""Thresholds into a torch model and out again, and what they do on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.capture import Batch, Reducer, Site, observe
from tilewright.nn.cats_mlp import CATSMLP, activation
from tilewright.sparsify.mlps import Names, gated_mlps
from tilewright.sparsify.thresholds import Thresholds

_ORIGINALS = "tilewright_cats_originals"


def apply_cats(
    model: nn.Module, thresholds: Thresholds, *, names: Names | Mapping[str, Names] | None = None
) -> nn.Module:
    """Replace the MLPs that have a threshold by :class:`tilewright.nn.CATSMLP` over the same layers, in place.

    Raises:
        ValueError: thresholds are for another score than the gate, name no MLP of the model, have another number of
            neurons, or the model has CATS already; nothing was changed then.
    """
    if thresholds.score != "gate":
        raise ValueError(
            f"thresholds compare the score {thresholds.score!r}, which is known only after the up projection; CATS "
            "needs score 'gate' (ranking 'activation', 'norm' or 'up')"
        )
    if getattr(model, _ORIGINALS, None):
        raise ValueError("the model has CATS thresholds already; remove_cats(model) first")
    mlps = gated_mlps(model, names)
    for name, threshold in thresholds.items():
        if name not in mlps:
            raise ValueError(
                f"threshold of {name!r}: the model has no such MLP; it has {', '.join(list(mlps)[:3])} ..."
            )
        inner = _inner(mlps[name].gate)
        if threshold.dim() == 1 and len(threshold) not in (1, inner):
            raise ValueError(f"threshold of {name} has {len(threshold)} values, the MLP {inner} neurons")
    originals = {}
    for name, threshold in thresholds.items():
        mlp = mlps[name]
        originals[name] = (mlp.module, mlp.names)
        made = CATSMLP(mlp.gate, mlp.up, mlp.down, threshold.to(next(mlp.module.parameters()).device), mlp.act)
        _put(model, name, made.train(mlp.module.training))
    object.__setattr__(model, _ORIGINALS, originals)
    return model


def remove_cats(model: nn.Module) -> nn.Module:
    """Put the MLPs back that :func:`apply_cats` replaced, in place, with the layers that CATS has now.

    Raises:
        ValueError: the model has no CATS.
    """
    originals: dict[str, Any] | None = getattr(model, _ORIGINALS, None)
    if not originals:
        raise ValueError(f"{type(model).__name__} has no CATS thresholds to remove")
    for name, (module, parts) in originals.items():
        cats = model.get_submodule(name)
        for ours, theirs in (("gate_proj", parts.gate), ("up_proj", parts.up), ("down_proj", parts.down)):
            module.register_module(theirs, cats.get_submodule(ours))
        _put(model, name, module)
    object.__setattr__(model, _ORIGINALS, None)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    if not name:
        raise ValueError("the model is itself the MLP; use CATSMLP.from_dense(mlp, threshold)")
    model.get_submodule(parent).register_module(child, module)


def _inner(gate: nn.Module) -> int:
    layer: Any = getattr(gate, "base_layer", gate)
    return int(layer.out_features)


@dataclass(frozen=True)
class LayerSparsity:
    """One MLP on some data.

    sparsity: share of activations that are dropped. union: mean over batches of the share of neurons that no token of
    the batch keeps: what a product of all these tokens together need not read. tokens: how many were seen.
    """

    name: str
    sparsity: float
    union: float
    tokens: int


def sparsity_report(
    model: nn.Module,
    batches: Iterable[Batch] | Batch,
    thresholds: Thresholds | None = None,
    *,
    names: Names | Mapping[str, Names] | None = None,
    progress: bool | None = None,
) -> list[LayerSparsity]:
    """What thresholds drop on data: a model that has CATS (its own thresholds), or a dense one with those given.

    Raises:
        ValueError: there are no thresholds, they compare another score, batches are empty, or an MLP never ran.
    """
    if thresholds is None:
        parts = {name: module.threshold for name, module in model.named_modules() if isinstance(module, CATSMLP)}
        if not parts:
            raise ValueError("the model has no CATS thresholds; give some, or apply_cats(model, thresholds)")
        thresholds, names = Thresholds(parts), None
    if thresholds.score != "gate":
        raise ValueError(f"thresholds compare the score {thresholds.score!r}; a report needs score 'gate'")
    mlps = gated_mlps(model, names)
    sites: dict[str | Site, Callable[[], Reducer]] = {}
    points = {}
    for name, threshold in thresholds.items():
        site = Site.parse(mlps[name].site("gate"))
        sites[Site(site.pattern, site.side, _dropped(mlps[name].act, threshold))] = _Dropped
        points[f"{name}.{mlps[name].names.gate}@output".lstrip(".")] = name
    data = [batches] if isinstance(batches, (Tensor, Mapping)) else batches
    seen = observe(model, data, sites, progress=progress, description="counting neurons")
    return [LayerSparsity(points[point], *found) for point, found in seen.items()]


def _dropped(act: Any, threshold: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: activation(act, x.float()).abs() < threshold.to(x.device)


class _Dropped:
    """(share dropped, mean share that no row of an update keeps, rows)."""

    def __init__(self) -> None:
        self.dropped = self.values = self.rows = self.updates = 0
        self.union = 0.0

    def update(self, x: Tensor) -> None:
        if x.shape[0] == 0:
            return
        self.dropped += int(x.sum())
        self.values += x.numel()
        self.rows += x.shape[0]
        self.union += float(x.all(0).double().mean())
        self.updates += 1

    def result(self) -> tuple[float, float, int]:
        if self.rows == 0:
            raise ValueError("no token was seen; every one was masked, or the module never ran")
        return self.dropped / self.values, self.union / self.updates, self.rows


def mean_sparsity(report: list[LayerSparsity]) -> float:
    """Mean over layers."""
    return float(torch.tensor([one.sparsity for one in report]).mean())
