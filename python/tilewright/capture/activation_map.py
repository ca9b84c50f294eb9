# SPDX-License-Identifier: Apache-2.0
"""An affine map by coordinate with a strength: what steering methods learn, and what the decode engine runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ActivationMap:
    """``T(z) = (1 + s (w - 1)) * z + s b`` over the last dimension; s = 0 is the identity, bit for bit.

    A map for :func:`tilewright.capture.intervened`: it computes in float32 (float64 for float64 activations), in the
    order of operations of the engine's kernel (csrc/ops/activation_map), and returns the activation's dtype.

    Attributes:
        weight, bias: w and b, float `[C]`.
        strength: s; a finite number.
        low, high: `[C]` or None: coordinates outside [low, high] are left alone (Linear-AcT's support rule).

    Raises:
        ValueError: shapes differ, a value is not finite, or only one of low and high is given.
    """

    weight: Tensor
    bias: Tensor
    strength: float = 1.0
    low: Tensor | None = None
    high: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError("ActivationMap: low and high come together; give both or neither")
        if self.weight.dim() != 1:
            raise ValueError(f"ActivationMap: weight has shape {list(self.weight.shape)}, needed [C]")
        for name in ("weight", "bias", "low", "high"):
            value = getattr(self, name)
            if value is None:
                continue
            if value.shape != self.weight.shape or not value.is_floating_point():
                raise ValueError(
                    f"ActivationMap: {name} is {value.dtype} {list(value.shape)}, "
                    f"needed float {list(self.weight.shape)}"
                )
            if name in ("weight", "bias") and not bool(torch.isfinite(value).all()):
                raise ValueError(f"ActivationMap: {name} holds NaN or infinite values")
        if not math.isfinite(self.strength):
            raise ValueError(f"ActivationMap: strength = {self.strength}, needed a finite number")

    @property
    def width(self) -> int:
        """C."""
        return len(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """The mapped activation, of x's shape and dtype."""
        if x.shape[-1] != self.width:
            raise ValueError(f"ActivationMap: {self.width} coordinates met an activation {list(x.shape)}")
        if self.strength == 0.0:
            return x
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        y = wide * ((self.weight.to(wide) - 1.0) * self.strength + 1.0) + self.bias.to(wide) * self.strength
        if self.low is not None and self.high is not None:
            y = torch.where((wide >= self.low.to(wide)) & (wide <= self.high.to(wide)), y, wide)
        return y.to(x.dtype)

    def at(self, strength: float) -> ActivationMap:
        """The same map with its strength multiplied by ``strength``."""
        return dataclasses.replace(self, strength=self.strength * strength)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Factor and summand at this strength: ``T(z) = factor * z + summand``.

        Raises:
            ValueError: the map has a range, so it is not affine.
        """
        if self.low is not None:
            raise ValueError("ActivationMap: a map with a range [low, high] is not affine; fit it with support='all'")
        return (self.weight - 1.0) * self.strength + 1.0, self.bias * self.strength

    def inverse(self, least: float = 1e-3) -> ActivationMap:
        """``T^-1(y) = (y - b) / w`` at this strength, with |w| held at ``least`` or more (its sign kept).

        Raises:
            ValueError: least is not positive, or the map has a range.
        """
        if not least > 0:
            raise ValueError(f"ActivationMap.inverse: least = {least}, needed > 0")
        factor, summand = self.affine()
        held = torch.where(factor < 0, -1.0, 1.0) * factor.abs().clamp_min(least)
        return ActivationMap(1.0 / held, -summand / held)

    def then(self, other: ActivationMap) -> ActivationMap:
        """One map for this one, then ``other``."""
        (w, b), (v, c) = self.affine(), other.affine()
        return ActivationMap(v * w, v * b + c)
