# SPDX-License-Identifier: Apache-2.0
"""A model run over data, batch by batch: activations as rows, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tilewright._progress import track
from tilewright.capture.hooks import tapped
from tilewright.capture.sites import Site, resolve


class Reducer(Protocol):
    """What :func:`observe` feeds: anything that takes rows and in the end says something about them."""

    def update(self, x: Tensor) -> None:
        """Take rows x [n, ...]; n may be 0."""

    def result(self) -> Any:
        """What was learned so far."""


Batch = Tensor | Mapping[str, Any]
NO_BATCHES = "batches is empty; at least one batch is needed"


def observe(
    model: nn.Module,
    batches: Iterable[Batch],
    reducers: Mapping[str | Site, Callable[[], Reducer]],
    *,
    progress: bool | None = None,
    description: str = "observing",
) -> dict[str, Any]:
    """Run the model over batches and reduce the named activations; memory does not grow with the data.

    batches: tensors (the model's only argument) or mappings of keyword arguments, such as a
        tokenizer returns. A mapping's ``attention_mask`` [B, T] removes padding: where it is 0, no
        reducer sees the activation. Token dimensions (B, T) come from the mask, or from integer
        ``input_ids``; otherwise all dimensions but the last count samples.
    reducers: for every site a function without arguments that makes a reducer (a class, mostly);
        each matched point gets its own.

    Returns results by point name, e.g. ``{"model.layers.0.mlp.down_proj@input": tensor(...)}``.
    The model runs without gradients, in the mode (train or eval) it is in.

    Raises:
        ValueError: a site matches nothing, the batches are empty, a mask fits no activation, or a
            result holds NaN or infinite values (named by point).
    """
    shape = TokenShape()
    states: dict[str, Reducer] = {}
    taps: dict[str | Site, Callable[[str, Tensor], None]] = {}
    for site, make in reducers.items():
        for point in resolve(model, site):
            if point.name in states:
                raise ValueError(f"{point.name} is matched by two sites; observe them in two calls")
            states[point.name] = make()
        taps[site] = lambda name, x: states[name].update(shape.rows(name, x.detach()))
    count = 0
    with torch.no_grad(), tapped(model, taps):
        for batch in track(batches, description, show=progress):
            count += 1
            shape.take(batch)
            run_batch(model, batch)
    if count == 0:
        raise ValueError(NO_BATCHES)
    results = {name: reducer.result() for name, reducer in states.items()}
    for name, result in results.items():
        require_finite(name, result)
    return results


def stream(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Sequence[str | Site],
    *,
    progress: bool | None = None,
    description: str = "capturing",
) -> Iterator[dict[str, Tensor]]:
    """Run the model over batches and yield, for each, the rows [n, ...] of every point by name.

    Padding is left out as in :func:`observe`. The hooks are attached only while the model runs, so that the consumer
    may use or change the model between batches; a model that is trained meanwhile gives activations of its current
    weights. A module that runs more than once in a batch gives its rows in order of the calls.

    Raises:
        ValueError: as :func:`observe`, but rows are not searched for NaN.
    """
    points = distinct_points(model, sites)
    shape = TokenShape()
    count = 0
    for batch in track(batches, description, show=progress):
        count += 1
        shape.take(batch)
        yield rows_of_batch(model, batch, sites, shape, points)
    if count == 0:
        raise ValueError(NO_BATCHES)


def rows_of_batch(
    model: nn.Module, batch: Batch, sites: Sequence[str | Site], shape: TokenShape, points: list[str]
) -> dict[str, Tensor]:
    """One forward pass; rows by point, in the order of ``points``."""
    seen: dict[str, list[Tensor]] = {name: [] for name in points}

    def tap(name: str, x: Tensor) -> None:
        seen[name].append(shape.rows(name, x.detach()))

    with torch.no_grad(), tapped(model, dict.fromkeys(sites, tap)):
        run_batch(model, batch)
    for name, rows in seen.items():
        if not rows:
            raise ValueError(f"{name}: the module did not run on this batch, so it has no activation")
    return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in seen.items()}


def distinct_points(model: nn.Module, sites: Sequence[str | Site]) -> list[str]:
    """Names of all points of the sites, each once.

    Raises:
        ValueError: no site, a site that matches nothing, or a point that two sites match.
    """
    if isinstance(sites, str) or not sites:
        raise ValueError(f"sites={sites!r}: a list with at least one site is needed")
    names: list[str] = []
    for site in sites:
        for point in resolve(model, site):
            if point.name in names:
                raise ValueError(f"{point.name} is matched by two sites; capture them in two calls")
            names.append(point.name)
    return names


def run_batch(model: nn.Module, batch: Batch) -> None:
    """One forward pass of a batch as :func:`observe` takes it."""
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch)


class TokenShape:
    """Turns an activation of the current batch into rows, without padding."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.tokens: tuple[int, ...] | None = None
        self.ids: Tensor | None = None

    def take(self, batch: Batch) -> None:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"attention_mask has shape {list(mask.shape)}; [batch, tokens] is needed")
        self.mask = None if mask is None or bool(mask.all()) else mask.bool()
        self.tokens = None if mask is None else tuple(mask.shape)
        whole = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() == 2
        if mask is None and isinstance(ids, Tensor) and whole:
            self.tokens = tuple(ids.shape)
        self.ids = ids if whole else None

    def table(self, first: int) -> Tensor | None:
        """int64 [n, 3] of the kept tokens: sequence (counted from ``first``), position, token id (-1: not known).

        None where the batch has no token dimensions.
        """
        if self.tokens is None:
            return None
        sequence, position = torch.meshgrid(*(torch.arange(size) for size in self.tokens), indexing="ij")
        ids = torch.full(self.tokens, -1) if self.ids is None else self.ids.cpu().long()
        table = torch.stack([sequence + first, position, ids], -1).flatten(0, 1)
        return table if self.mask is None else table[self.mask.reshape(-1).cpu()]

    def rows(self, name: str, x: Tensor) -> Tensor:
        if self.tokens is None:
            return x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1)
        count = self.tokens[0] * self.tokens[1]
        if tuple(x.shape[:2]) == self.tokens:
            x = x.reshape(count, *x.shape[2:])
        elif x.shape[0] != count:
            raise ValueError(
                f"{name} has shape {list(x.shape)}, which does not start with the batch's tokens {list(self.tokens)}; "
                "give the site a transform that puts them first"
            )
        return x if self.mask is None else x[self.mask.reshape(-1).to(x.device)]


def require_finite(name: str, result: Any) -> None:
    if isinstance(result, tuple):
        for part in result:
            require_finite(name, part)
        return
    parts = vars(result).values() if hasattr(result, "__dict__") else ()
    tensors = (result,) if isinstance(result, Tensor) else parts
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: activations hold NaN or infinite values; the model or its input is damaged")
