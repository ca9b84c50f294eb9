# SPDX-License-Identifier: Apache-2.0
"""Calibrate a torch model, choose alpha and mode by output error, put integer layers in the place of its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright._progress import track
from tilewright.capture import Batch, Reducer, Site, observe
from tilewright.quantize.crossquant.config import CrossQuantConfig
from tilewright.quantize.crossquant.fold import Fold, Group, folds_of, groups_of, linears_of, producer_rows
from tilewright.quantize.crossquant.linear import CrossQuantLinear, divide_outputs_, weight_of
from tilewright.quantize.crossquant.scales import _normalised
from tilewright.reducers import AbsMax, Reservoir, Several

SAMPLE_ROWS = 128


@dataclass(frozen=True)
class LinearInput:
    """What calibration saw of one linear's input: column maxima c [I], and a sample of rows [n, I]."""

    col_absmax: Tensor
    sample: Tensor


class ColumnAbsMaxObserver(AbsMax):
    """Running c_j = max_i |X_ij| over calibration rows: a reducer for :func:`tilewright.capture.observe`.

    ``result()`` is float32 [I]; ValueError when no row was seen.
    """

    @property
    def col_absmax(self) -> Tensor:
        """The maxima so far."""
        return self.result()


def _without_first(x: Tensor) -> Tensor:
    """x [B, T, I] with the first position zeroed, which no maximum sees."""
    if x.dim() != 3:
        raise ValueError(f"exclude_first needs activations [B, T, I], got {list(x.shape)}")
    x = x.clone()
    x[:, 0] = 0
    return x


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    skip: Sequence[str] = ("lm_head",),
    sample_rows: int = SAMPLE_ROWS,
    exclude_first: bool = False,
    progress: bool | None = None,
) -> dict[str, LinearInput]:
    """Column maxima and a sample of the inputs of all linears, by module name. Padding does not count.

    exclude_first: leave the first position of each sequence out of the maxima; a massive activation there would set
        c for ever (its token's own row scale still covers it in "tight" mode, in "static" it saturates).

    Raises:
        ValueError: batches are empty, everything is masked, or an activation is NaN or infinite (named).
    """
    names = linears_of(model, skip)

    def reducers() -> Several:
        return Several(ColumnAbsMaxObserver, lambda: Reservoir(sample_rows))

    transform = _without_first if exclude_first else None
    wanted: dict[str | Site, Callable[[], Reducer]] = {
        Site(f"re:{_escaped(name)}", "input", transform): reducers for name in names
    }
    seen = observe(model, batches, wanted, progress=progress, description="calibrating columns")
    return {name: LinearInput(*seen[f"{name}@input"]) for name in names}


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


@dataclass(frozen=True)
class Choice:
    """How a group of linears is scaled: u [I] = factor with c^(1-alpha) = gain u, exponent, mode, and the relative
    squared error of their outputs on the calibration sample (NaN where nothing was compared)."""

    factor: Tensor
    gain: float
    alpha: float
    mode: str
    error: float


Choose = Callable[[Group, list[Tensor], list[LinearInput], CrossQuantConfig], Choice]


def group_maxima(group: Group, inputs: list[LinearInput]) -> Tensor:
    """c [I] of a group: the same for columns that share a producer output."""
    c = torch.stack([one.col_absmax for one in inputs]).amax(0)
    return group.rule.expanded(group.rule.shared(c))


def crossquant_choice(
    group: Group, weights: list[Tensor], inputs: list[LinearInput], config: CrossQuantConfig
) -> Choice:
    """The alpha and mode of a group that the config asks for, by least output error where it leaves them open."""
    c = group_maxima(group, inputs)
    alphas = config.alphas if isinstance(config.alpha, str) else (config.alpha,)
    modes = ("tight", "static") if config.mode == "auto" else (config.mode,)
    candidates = [Choice(*_normalised(c, a), a, m, float("nan")) for a in alphas for m in modes]
    return least_error(candidates, weights, inputs[0].sample, config)


def least_error(candidates: list[Choice], weights: list[Tensor], x: Tensor, config: CrossQuantConfig) -> Choice:
    """The candidate of least ||X W^T - Xhat What^T||^2 over the group's linears; a single one is not compared."""
    if len(candidates) == 1:
        return candidates[0]
    exact = [x @ w.T for w in weights]
    energy = max(sum(float(y.square().sum()) for y in exact), torch.finfo(torch.float32).tiny)
    best = candidates[0]
    for one in candidates:
        wrong = 0.0
        for weight, y in zip(weights, exact, strict=True):
            wrong += float((_layer(weight, None, one, config)(x) - y).square().sum())
        scored = Choice(one.factor, one.gain, one.alpha, one.mode, wrong / energy)
        if best is candidates[0] or scored.error < best.error:
            best = scored
    return best


def _layer(
    weight: Tensor, bias: Tensor | None, choice: Choice, config: CrossQuantConfig, folded: bool = False
) -> CrossQuantLinear:
    return CrossQuantLinear(
        weight, bias, choice.factor, w_bits=config.w_bits, group_size=config.group_size, a_bits=config.a_bits,
        alpha=choice.alpha, mode=choice.mode, gain=choice.gain, folded=folded,
    )  # fmt: skip


@torch.no_grad()
def apply_crossquant_(
    model: nn.Module,
    config: CrossQuantConfig,
    calibration: Mapping[str, LinearInput],
    *,
    rules: Sequence[Fold] | None = None,
    choose: Choose = crossquant_choice,
    progress: bool | None = None,
) -> dict[str, Choice]:
    """Replace the linears of ``model`` in place by :class:`CrossQuantLinear`; what was chosen, by module name.

    calibration: from :func:`calibrate` on the same model. rules: who produces whose input; the family's
    (:func:`folds_of`) when None. Linears that no rule names are scaled online, so any model works.
    choose: the function that decides u, alpha and mode of a group (a baseline may take its place).

    Raises:
        ValueError: a linear was not calibrated, or a rule does not fit the model; nothing was changed then.
    """
    groups = groups_of(model, folds_of(model) if rules is None else rules, config.skip)
    modules: dict[str, Any] = dict(model.named_modules())
    for name in (name for group in groups for name in group.consumers):
        if name not in calibration:
            raise ValueError(f"{name} was not calibrated; calibrate(model, batches, skip={config.skip!r}) does it")
    plan = []
    for group in track(groups, "choosing scales", show=progress):
        weights = [weight_of(modules[name]) for name in group.consumers]
        plan.append((group, choose(group, weights, [calibration[name] for name in group.consumers], config)))
    # All divisions first: a producer may itself be a consumer, and must be divided before it is rounded.
    for group, choice in plan:
        if config.fold and group.producer is not None:
            producer = modules[group.producer]
            divide_outputs_(producer, group.rule.shared(choice.factor), producer_rows(producer, group.rule))
    chosen: dict[str, Choice] = {}
    for group, choice in plan:
        for name in group.consumers:
            old, folded = modules[name], config.fold and group.producer is not None
            new = _layer(weight_of(old), getattr(old, "bias", None), choice, config, folded)
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, new.train(old.training))
            chosen[name] = choice
    return chosen
