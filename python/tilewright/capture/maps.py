# SPDX-License-Identifier: Apache-2.0
"""The usual interventions: replace, add, scale, affine; each makes a map for :func:`tilewright.capture.intervened`.

All compute in float32 (float64 for float64 activations) on the activation's device and return its shape and dtype, so
a vector learned in float32 can steer a bfloat16 model. ``positions`` restricts a map to some tokens of an activation
``[B, T, ...]``: a slice or a list of indices along dimension 1 of the tensor at hand (while decoding with a cache that
tensor holds the newest token alone); other tokens keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tilewright.capture.sites import Transform

Positions = slice | Sequence[int] | None


def replace(value: Tensor | float, *, positions: Positions = None) -> Transform:
    """x -> value, which broadcasts to the shape of x.

    Raises (when the map meets an activation):
        ValueError: ``value`` does not broadcast to it.
    """
    return _map("replace", lambda x: _fit("replace", "value", value, x).expand(x.shape), positions)


def add(vector: Tensor | float, *, positions: Positions = None) -> Transform:
    """x -> x + vector, which broadcasts to x: ``[C]`` adds one direction to every token. Errors as :func:`replace`."""
    return _map("add", lambda x: x + _fit("add", "vector", vector, x), positions)


def scale(factor: Tensor | float, *, positions: Positions = None) -> Transform:
    """x -> factor * x, which broadcasts to x: ``[C]`` per channel, 0 ablates. Errors as :func:`replace`."""
    return _map("scale", lambda x: x * _fit("scale", "factor", factor, x), positions)


def affine(weight: Tensor, bias: Tensor | float = 0.0, *, positions: Positions = None) -> Transform:
    """x -> weight x + bias over the last dimension of x.

    weight: ``[C]``, one factor per channel, or ``[C, C]``, a matrix with y_i = sum_j weight_ij x_j. bias: ``[C]``.

    Raises:
        ValueError: weight is not [C] or [C, C]; or, when the map meets an activation, C is not its last size.
    """
    if weight.dim() not in (1, 2) or weight.shape[0] != weight.shape[-1]:
        raise ValueError(f"affine: weight has shape {list(weight.shape)}; [C] or [C, C] is needed")

    def change(x: Tensor) -> Tensor:
        if x.shape[-1] != weight.shape[0]:
            raise ValueError(
                f"affine: weight has shape {list(weight.shape)}, the activation {list(x.shape)}; "
                f"its last size {x.shape[-1]} is needed"
            )
        w = weight.to(x)
        return (x * w if w.dim() == 1 else x @ w.T) + _fit("affine", "bias", bias, x)

    return _map("affine", change, positions)


def _fit(map_name: str, argument: str, value: Tensor | float, x: Tensor) -> Tensor:
    """``value`` on x's device in x's dtype; ValueError unless it broadcasts to x without enlarging it."""
    tensor = torch.as_tensor(value).to(x)
    try:
        fits = torch.broadcast_shapes(tensor.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{map_name}: {argument} has shape {list(tensor.shape)}, which does not broadcast to the activation's "
            f"{list(x.shape)}"
        )
    return tensor


def _map(name: str, change: Callable[[Tensor], Tensor], positions: Positions) -> Transform:
    def apply(x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if positions is None:
            return change(x.to(wide)).to(x.dtype)
        if x.dim() < 2:
            raise ValueError(f"{name}: positions need an activation [B, T, ...], got {list(x.shape)}")
        index = positions if isinstance(positions, slice) else list(positions)
        try:
            some = x[:, index]
        except IndexError as wrong:
            raise ValueError(f"{name}: positions {index} are not all among the {x.shape[1]} tokens") from wrong
        changed = x.clone()
        changed[:, index] = change(some.to(wide)).to(x.dtype)
        return changed

    return apply
