# SPDX-License-Identifier: Apache-2.0
"""Taps on the original modules: those that look and those that replace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tilewright.capture.sites import Point, Site, Transform, resolve

Tap = Callable[[str, Tensor], "Tensor | None"]


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
    with _hooked(model, _replacements(maps), replace=True) as points:
        yield points


def attach(model: nn.Module, maps: Mapping[str, Transform]) -> Callable[[], None]:
    """As :func:`intervened`, but until the function that it returns is called."""
    _, handles = _place(model, _replacements(maps), replace=True)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _replacements(maps: Mapping[Any, Transform]) -> dict[str | Site, Tap]:
    for site in maps:
        if isinstance(site, Site) and site.transform is not None:
            raise ValueError(f"site {site.pattern!r} has a transform; an intervention takes the map itself instead")
    return {site: _replacement(change) for site, change in maps.items()}


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
    points, handles = _place(model, taps, replace=replace)
    try:
        yield points
    finally:
        for handle in handles:
            handle.remove()


def _place(model: nn.Module, taps: Mapping[Any, Tap], *, replace: bool) -> tuple[list[Point], list[RemovableHandle]]:
    """All names are resolved before the first hook is placed."""
    modules = dict(model.named_modules())
    placed = [(point, tap) for site, tap in taps.items() for point in resolve(model, site)]
    handles = []
    for point, tap in placed:
        module = modules[point.module_name]
        if point.side == "input":
            hook = _input_hook(point, tap, replace)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_output_hook(point, tap, replace)))
    return [point for point, _ in placed], handles


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
