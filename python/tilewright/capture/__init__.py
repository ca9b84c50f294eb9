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
map
    What an intervention does to an activation: any function of a tensor that keeps shape and dtype;
    :func:`replace`, :func:`add`, :func:`scale` and :func:`affine` make the usual ones; an
    :class:`ActivationMap` is affine by coordinate with a strength, and runs in the decode engine too.
reducer
    An object with ``update(x)`` for rows ``x`` [n, ...] and ``result()``; see
    :mod:`tilewright.reducers`. :func:`observe` feeds reducers from a stream of batches,
    :func:`stream` hands out the rows themselves, :func:`record` writes them to an :class:`ActivationStore`.

>>> import torch
>>> from tilewright.reducers import AbsMax
>>> net = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.ReLU())
>>> _ = torch.nn.init.ones_(net[0].weight)
>>> stats = observe(net, [torch.ones(4, 3), -2 * torch.ones(4, 3)], {"0": AbsMax})
>>> stats["0@output"]
tensor([6., 6.])
>>> with intervened(net, {"0": add(torch.tensor([1.0, -5.0]))}):
...     net(torch.ones(1, 3)).tolist()
[[4.0, 0.0]]
"""

from __future__ import annotations

from tilewright.capture.activation_map import ActivationMap
from tilewright.capture.hooks import Tap, attach, intervened, tapped
from tilewright.capture.maps import add, affine, replace, scale
from tilewright.capture.sites import SIDES, Point, Site, Transform, resolve
from tilewright.capture.store import ActivationStore, record
from tilewright.capture.stream import Batch, Reducer, observe, stream

__all__ = [
    "SIDES",
    "ActivationMap",
    "ActivationStore",
    "Batch",
    "Point",
    "Reducer",
    "Site",
    "Tap",
    "Transform",
    "add",
    "affine",
    "attach",
    "intervened",
    "observe",
    "record",
    "replace",
    "resolve",
    "scale",
    "stream",
    "tapped",
]
