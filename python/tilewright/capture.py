# SPDX-License-Identifier: Apache-2.0
"""Named activations of any torch module, streamed batch by batch.

Everything that looks at a model, and everything that calibrates on data, takes its activations from
here. The model is never re-implemented or rewritten: hooks sit on the original modules, are removed
on every exit, and a model that is only observed computes bitwise what it computed before.

Vocabulary
----------
site
    *Which* activations: a glob over module names (``model.layers.*.mlp.down_proj``; ``*`` stays
    within one component, ``**`` crosses dots), or a regular expression after ``re:``; ``@input`` or
    ``@output`` (the default) at the end says which side of the module. :class:`Site` says the same
    with a transform.
point
    One activation that a site matched: ``model.layers.3.mlp.down_proj@input``.
tap
    A function of (point name, activation) called whenever the model computes a tapped point.
    :func:`tapped` attaches taps that look, :func:`intervened` those that replace.
reducer
    An object with ``update(x)`` for rows ``x`` [n, ...] and ``result()``; see
    :mod:`tilewright.reducers`. :func:`observe` feeds reducers from a stream of batches.

>>> import torch
>>> from tilewright.reducers import AbsMax
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.ReLU())
>>> _ = torch.nn.init.ones_(net[0].weight)
>>> stats = observe(net, [torch.ones(4, 3), -2 * torch.ones(4, 3)], {"0": AbsMax})
>>> stats["0@output"]
tensor([6., 6.])
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tilewright._progress import track

Transform = Callable[[Tensor], Tensor]
Tap = Callable[[str, Tensor], "Tensor | None"]
SIDES = ("input", "output")


class Reducer(Protocol):
    """What :func:`observe` feeds: anything that takes rows and in the end says something about them."""

    def update(self, x: Tensor) -> None:
        """Take rows x [n, ...]; n may be 0."""

    def result(self) -> Any:
        """What was learned so far."""


@dataclass(frozen=True)
class Site:
    """A set of activations: modules by name pattern, and which side of them.

    pattern: glob over the names of ``named_modules()``, or ``re:`` and a regular expression that must
        match the whole name. ``""`` is the model itself.
    side: "input" (first argument of the module's forward) or "output" (its first result).
    transform: applied to every activation before anything else sees it (reshape to heads, rotate,
        take a norm...). It must keep the leading token dimensions. Not used by interventions.
    """

    pattern: str
    side: str = "output"
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"side={self.side!r} of site {self.pattern!r}: need 'input' or 'output'")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """``"pattern"``, ``"pattern@input"`` or ``"pattern@output"`` to a Site; a Site stays as it is."""
        if isinstance(text, Site):
            return text
        pattern, at, side = text.rpartition("@")
        return cls(pattern, side) if at else cls(text)

    def matches(self, name: str) -> bool:
        """Does the module called ``name`` belong to this site?"""
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], name) is not None
        return re.fullmatch(_glob(self.pattern), name) is not None


def _glob(pattern: str) -> str:
    """Regular expression of a dotted glob: ``**`` any text, ``*`` and ``?`` text without dots."""
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return "".join(wild.get(part, re.escape(part)) for part in parts)


@dataclass(frozen=True)
class Point:
    """One activation of one module: ``name`` is ``<module name>@<side>``."""

    module_name: str
    side: str
    transform: Transform | None = None

    @property
    def name(self) -> str:
        return f"{self.module_name}@{self.side}"


def resolve(model: nn.Module, site: str | Site) -> list[Point]:
    """All points of ``model`` that a site matches, in the order of ``named_modules()``.

    Raises:
        ValueError: nothing matches; the message lists the nearest names that exist.
    """
    site = Site.parse(site)
    names = [name for name, _ in model.named_modules()]
    matched = [name for name in names if site.matches(name)]
    if not matched:
        wanted = site.pattern.removeprefix("re:")
        near = _nearest(wanted, names)
        raise ValueError(
            f"site {site.pattern!r} matches no module of {type(model).__name__}; "
            + (f"near names: {', '.join(near)}" if near else f"it has {', '.join(names[1:9])}")
        )
    return [Point(name, site.side, site.transform) for name in matched]


def _nearest(wanted: str, names: list[str]) -> list[str]:
    """Existing names close to a pattern, compared with numbers blanked so that layers do not crowd them out."""
    blanked: dict[str, str] = {}
    for name in names:
        blanked.setdefault(re.sub(r"\d+", "*", name), name)
    close = difflib.get_close_matches(re.sub(r"\d+", "*", wanted), list(blanked), n=5, cutoff=0.5)
    return [blanked[c] for c in close]


@contextlib.contextmanager
def tapped(model: nn.Module, taps: Mapping[str | Site, Callable[[str, Tensor], None]]) -> Iterator[list[Point]]:
    """While the context lives, call ``tap(point name, activation)`` for every matched activation.

    The activation is the model's own tensor, after the site's transform; do not change it in place.
    Yields the points.
    """
    with _hooked(model, taps, replace=False) as points:
        yield points


@contextlib.contextmanager
def intervened(model: nn.Module, maps: Mapping[str | Site, Transform]) -> Iterator[list[Point]]:
    """While the context lives, replace every matched activation ``x`` by ``maps[site](x)``.

    The map must keep shape and dtype; a site's own transform is not allowed here. Maps on the same
    point apply in the order given. Yields the points.
    """
    for site in maps:
        if isinstance(site, Site) and site.transform is not None:
            raise ValueError(f"site {site.pattern!r} has a transform; an intervention takes the map itself instead")
    taps: dict[str | Site, Tap] = {site: _replacement(change) for site, change in maps.items()}
    with _hooked(model, taps, replace=True) as points:
        yield points


def _replacement(change: Transform) -> Tap:
    def tap(name: str, x: Tensor) -> Tensor:
        changed = change(x)
        if changed.shape != x.shape or changed.dtype != x.dtype:
            raise ValueError(
                f"intervention on {name}: the map returned {list(changed.shape)} {changed.dtype}, "
                f"needed {list(x.shape)} {x.dtype}"
            )
        return changed

    return tap


@contextlib.contextmanager
def _hooked(model: nn.Module, taps: Mapping[Any, Tap], *, replace: bool) -> Iterator[list[Point]]:
    modules = dict(model.named_modules())
    handles = []
    points: list[Point] = []
    try:
        for site, tap in taps.items():
            for point in resolve(model, site):
                points.append(point)
                module = modules[point.module_name]
                if point.side == "input":
                    hook = _input_hook(point, tap, replace)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(_output_hook(point, tap, replace)))
        yield points
    finally:
        for handle in handles:
            handle.remove()


def _call(point: Point, tap: Tap, value: Any) -> Tensor | None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{point.name} is a {type(value).__name__}, not a tensor; tap a module inside it")
    return tap(point.name, value if point.transform is None else point.transform(value))


def _input_hook(point: Point, tap: Tap, replace: bool) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = None if args else next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
        if not args and key is None:
            raise TypeError(f"{point.name}: the module was called without a tensor")
        new = _call(point, tap, args[0] if key is None else kwargs[key])
        if not replace:
            return None
        return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

    return hook


def _output_hook(point: Point, tap: Tap, replace: bool) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        in_tuple = isinstance(output, tuple) and len(output) > 0
        new = _call(point, tap, output[0] if in_tuple else output)
        if not replace:
            return None
        return (new, *output[1:]) if in_tuple else new

    return hook


Batch = Tensor | Mapping[str, Any]


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
    shape = _TokenShape()
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
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
    if count == 0:
        raise ValueError("batches is empty; at least one batch is needed")
    results = {name: reducer.result() for name, reducer in states.items()}
    for name, result in results.items():
        _require_finite(name, result)
    return results


class _TokenShape:
    """Turns an activation of the current batch into rows, without padding."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.tokens: tuple[int, ...] | None = None

    def take(self, batch: Batch) -> None:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"attention_mask has shape {list(mask.shape)}; [batch, tokens] is needed")
        self.mask = None if mask is None or bool(mask.all()) else mask.bool()
        self.tokens = None if mask is None else tuple(mask.shape)
        if mask is None and isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() == 2:
            self.tokens = tuple(ids.shape)

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


def _require_finite(name: str, result: Any) -> None:
    if isinstance(result, tuple):
        for part in result:
            _require_finite(name, part)
        return
    parts = vars(result).values() if hasattr(result, "__dict__") else ()
    tensors = (result,) if isinstance(result, Tensor) else parts
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: activations hold NaN or infinite values; the model or its input is damaged")
