# SPDX-License-Identifier: Apache-2.0
"""Which neurons a metric calls inactive: CETT and the baselines, each as one rule a layer.

A criterion has one number that rises with sparsity, and :meth:`Criterion.level` maps [0, 1] onto it, so that one search
serves all of them. A neuron with s = 0 contributes nothing and is inactive under every criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tilewright.sparsify.sparsing_law.cett import TailError
from tilewright.sparsify.sparsing_law.neurons import FeedForward, neuron_thresholds

Metric = Literal["zero", "fat", "topk", "cats", "cett", "cett_ppl"]
# FAT's threshold is shared by all layers; its quantiles come from so many values of all of them.
_POOLED = 1 << 22
# Rows of each layer from which a ratio is guessed before a pass shows it.
_COARSE = 128


@dataclass(frozen=True)
class Rule:
    """How one layer is thinned: where, and what is dropped there.

    site: a site of :mod:`tilewright.capture`. drop: activation [..., m] -> bool, true for inactive neurons.
    """

    site: str
    drop: Callable[[Tensor], Tensor]


class Criterion:
    """A metric on a model whose activations were sampled.

    name: of the metric. sees: what it looks at, "hidden" (h, the input of Wo), or "gate" (s).
    """

    name: str
    sees: Literal["hidden", "gate"]
    what: str

    def rules(self, arg: float) -> dict[str, Rule]:
        """By layer."""
        raise NotImplementedError

    def sampled_ratio(self, arg: float) -> float:
        """Activation ratio on a part of the sample, mean over layers: a guess of what a pass will give."""
        raise NotImplementedError

    def level(self, level: float) -> float:
        """The argument of a level in [0, 1]; the share dropped, or CETT itself."""
        return level

    def check(self, arg: float | None) -> float:
        """The argument itself.

        Raises:
            ValueError: it is none or out of range.
        """
        if arg is None or isinstance(arg, bool) or not 0 <= arg <= 1:
            raise ValueError(f"metric {self.name!r} with arg={arg!r}: {self.what}, 0 to 1, is needed")
        return float(arg)


class Zero(Criterion):
    """s_i = 0: what a ReLU switches off; for other activations next to nothing."""

    name, sees, what = "zero", "gate", "nothing"

    def __init__(self, blocks: list[FeedForward], sample: Mapping[str, Tensor]) -> None:
        self.blocks, self.sample = blocks, sample

    def rules(self, arg: float) -> dict[str, Rule]:  # noqa: ARG002
        return {block.name: gate_rule(block, lambda s: s == 0) for block in self.blocks}

    def sampled_ratio(self, arg: float) -> float:  # noqa: ARG002
        return _mean([float((s != 0).double().mean()) for s in _coarse(self.sample).values()])

    def check(self, arg: float | None) -> float:
        if arg not in (None, 0):
            raise ValueError(f"metric 'zero' with arg={arg!r}: it has no argument")
        return 0.0


class Fat(Criterion):
    """|s_i| < eps, one eps for all layers."""

    name, sees, what = "fat", "gate", "a threshold"

    def __init__(self, blocks: list[FeedForward], sample: Mapping[str, Tensor]) -> None:
        self.blocks, self.sample = blocks, sample
        each = max(1, _POOLED // len(sample))
        parts = (s.abs().float().reshape(-1) for s in sample.values())
        self.pooled = torch.cat([part[:: -(-len(part) // each)] for part in parts]).sort().values

    def rules(self, arg: float) -> dict[str, Rule]:
        return {block.name: gate_rule(block, _weak(below(arg))) for block in self.blocks}

    def sampled_ratio(self, arg: float) -> float:
        return _mean([_kept(s, arg) for s in _coarse(self.sample).values()])

    def level(self, level: float) -> float:
        """The quantile of |s| over all layers."""
        return float(self.pooled[min(int(level * len(self.pooled)), len(self.pooled) - 1)])

    def check(self, arg: float | None) -> float:
        if arg is None or not arg >= 0:
            raise ValueError(f"metric 'fat' with arg={arg!r}: a threshold on |s| of 0 or more is needed")
        return float(arg)


class TopK(Criterion):
    """All but the k largest |s_i| of each token, k = m (1 - arg) rounded, at least 1.

    scope: "token", or "global": k times tokens are kept of a whole batch, padding included, as the reference code does.
    """

    name, sees, what = "topk", "gate", "the share of neurons dropped"

    def __init__(self, blocks: list[FeedForward], sample: Mapping[str, Tensor], scope: str = "token") -> None:
        if scope not in ("token", "global"):
            raise ValueError(f"scope={scope!r}: 'token' or 'global' is needed")
        self.blocks, self.sample, self.scope = blocks, sample, scope

    def rules(self, arg: float) -> dict[str, Rule]:
        def drop(s: Tensor) -> Tensor:
            size = s.abs().float()
            flat = size.reshape(1, -1) if self.scope == "global" else size
            kept = max(1, round((1 - arg) * s.shape[-1])) * (flat.shape[-1] // s.shape[-1])
            mask = torch.ones_like(flat, dtype=torch.bool)
            return mask.scatter_(-1, flat.topk(kept, -1).indices, False).view_as(s)

        return {block.name: gate_rule(block, _weak(drop)) for block in self.blocks}

    def sampled_ratio(self, arg: float) -> float:
        found = []
        for s in _coarse(self.sample).values():
            kept = max(1, round((1 - arg) * s.shape[-1]))
            found.append(float((s != 0).sum(-1).clamp(max=kept).double().mean()) / s.shape[-1])
        return _mean(found)


class Cats(Criterion):
    """|s_i| < t_l, the arg-quantile of |s| in layer l (CATS, arXiv 2404.08763)."""

    name, sees, what = "cats", "gate", "the share of neurons dropped"

    def __init__(self, blocks: list[FeedForward], sample: Mapping[str, Tensor]) -> None:
        self.blocks, self.sample = blocks, sample

    def threshold(self, layer: str, arg: float) -> float:
        """The arg-quantile of |s| in the layer."""
        return _quantile(self.sample[layer], arg)

    def rules(self, arg: float) -> dict[str, Rule]:
        bounds = {block.name: below(self.threshold(block.name, arg)) for block in self.blocks}
        return {block.name: gate_rule(block, _weak(bounds[block.name])) for block in self.blocks}

    def sampled_ratio(self, arg: float) -> float:
        return _mean([_kept(s, _quantile(s, arg)) for s in _coarse(self.sample).values()])


class Cett(Criterion):
    """||n_i|| = |h_i| ||Wo[:, i]|| < eps_l, with the eps_l at which every layer's tail error is arg."""

    name, sees, what = "cett", "hidden", "a tail error"

    def __init__(self, blocks: list[FeedForward], errors: Mapping[str, TailError]) -> None:
        self.blocks, self.errors = blocks, errors
        rows = _coarse({name: one.h for name, one in errors.items()})
        self.coarse = {name: TailError(rows[name], one.weight, name) for name, one in errors.items()}

    def eps(self, arg: float) -> dict[str, float]:
        """Thresholds on ||n_i|| by layer."""
        return {block.name: self.errors[block.name].threshold(arg) for block in self.blocks}

    def rules(self, arg: float) -> dict[str, Rule]:
        return truncation_rules(self.blocks, self.eps(arg), {name: one.norms for name, one in self.errors.items()})

    def sampled_ratio(self, arg: float) -> float:
        return _mean([one.active(one.threshold(arg)) for one in self.coarse.values()])


def truncation_rules(
    blocks: list[FeedForward], eps: Mapping[str, float], norms: Mapping[str, Tensor]
) -> dict[str, Rule]:
    """Rules |h_i| < eps_l / ||Wo[:, i]|| on the input of the down projections."""
    return {
        block.name: Rule(f"{block.down}@input", below(neuron_thresholds(eps[block.name], norms[block.name])))
        for block in blocks
    }


def below(bound: Tensor | float) -> Callable[[Tensor], Tensor]:
    """|x| < bound, compared in float32 (float64 for float64); a NaN is not below."""

    def drop(x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return wide.abs() < (bound.to(x.device) if isinstance(bound, Tensor) else bound)

    return drop


def _weak(drop: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a rule drops, and exact zeros, which no metric counts as active."""
    return lambda s: drop(s) | (s == 0)


def _kept(s: Tensor, bound: float) -> float:
    """Share of |s| at or above a bound, zeros left out."""
    return float(((s.abs() >= bound) & (s != 0)).double().mean())


def _quantile(s: Tensor, share: float) -> float:
    """The value of rank ``share`` n + 1 among |s|, which is kept; 0 for a share of 0."""
    size = s.abs().float().reshape(-1)
    rank = int(share * len(size))
    return 0.0 if rank == 0 else float(size.kthvalue(min(rank + 1, len(size))).values)


def _coarse(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: rows[:: max(1, len(rows) // _COARSE)] for name, rows in sample.items()}


def gate_rule(block: FeedForward, drop: Callable[[Tensor], Tensor]) -> Rule:
    site, act = block.gate_site
    return Rule(site, drop if act is None else lambda z: drop(act(z)))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
