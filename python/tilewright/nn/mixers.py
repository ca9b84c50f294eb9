# SPDX-License-Identifier: Apache-2.0
"""Token mixers by name. A method's folder ``nn/<method>/`` exposes ``MIXERS``, and nothing else registers it.

``MIXERS`` maps names to classes (or ``"module:Class"`` strings, for what shall be imported on use). A class takes
``hidden_size``, ``num_heads``, ``layer_idx`` and, where it needs it, ``num_layers``, then options of its own.
Folders of other families may expose it too (``tilewright.linearize.<method>``).
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

FAMILIES = ("nn", "linearize")


@cache
def discover() -> dict[str, Any]:
    """All mixers by name, sorted: what the ``MIXERS`` of the methods' folders say.

    Raises:
        ValueError: two folders use one name.
    """
    import tilewright

    found: dict[str, tuple[str, Any]] = {}
    for family in FAMILIES:
        paths = [str(Path(p) / family) for p in tilewright.__path__]
        for module in pkgutil.iter_modules(paths):
            if not module.ispkg:
                continue
            where = f"tilewright.{family}.{module.name}"
            for name, mixer in getattr(importlib.import_module(where), "MIXERS", {}).items():
                if name in found:
                    raise ValueError(f"mixer {name!r} is registered twice: by {found[name][0]} and by {where}")
                found[name] = (where, mixer)
    return {name: found[name][1] for name in sorted(found)}


def find(name: str) -> type[nn.Module]:
    """The mixer of this name; an unknown one is an error that lists near and existing names."""
    mixers = discover()
    if name not in mixers:
        near = get_close_matches(name, mixers, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(mixers)}"
        raise ValueError(f"mixer {name!r} is not known; {hint}")
    mixer = mixers[name]
    if isinstance(mixer, str):
        module, _, attribute = mixer.partition(":")
        mixer = getattr(importlib.import_module(module), attribute)
    return mixer


def build(name: str, *, hidden_size: int, num_heads: int, layer_idx: int, num_layers: int, **options: Any) -> nn.Module:
    """Make the mixer of this name for one layer of a model.

    Raises:
        ValueError: the name or an option is unknown, or the sizes do not fit.
    """
    mixer = find(name)
    known = inspect.signature(mixer).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()) and (unknown := sorted(options.keys() - known.keys())):
        raise ValueError(
            f"mixer {name!r}: option {unknown[0]!r} is unknown; it takes {', '.join(k for k in known if k != 'self')}"
        )
    place: dict[str, Any] = {"hidden_size": hidden_size, "num_heads": num_heads, "layer_idx": layer_idx}
    if "num_layers" in known:
        place["num_layers"] = num_layers
    return mixer(**{**place, **options})
