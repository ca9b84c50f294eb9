# SPDX-License-Identifier: Apache-2.0
"""What CrossQuant can be asked for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tilewright.quantize._config import require_one_of, strict

ALPHA = 0.15
ALPHAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class CrossQuantConfig:
    """Row-and-column scales of activations, folded into the weights before those are rounded.

    w_bits: 8, one scale an output channel, or 4, one a group of ``group_size`` input columns. a_bits: 2 to 8, one scale
    a token. alpha: exponent of the row maximum in [0, 1] (1 is per token), or "search": of ``alphas`` the one of least
    output error on calibration rows, for each set of linears that share their input. mode: "tight" takes the row's
    scale after the columns are divided, "static" is the published scale with calibrated columns, "auto" the one of
    least output error. fold: put 1/u into the layer before where there is one; otherwise multiply as the model runs.
    skip: last components of module names that stay as they are.

    Raises:
        ValueError: a field has a value that is not allowed; the message names it.
    """

    w_bits: int = 8
    a_bits: int = 8
    group_size: int = 128
    alpha: float | str = ALPHA
    alphas: tuple[float, ...] = ALPHAS
    mode: str = "tight"
    fold: bool = True
    skip: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        require_one_of("CrossQuantConfig", "w_bits", self.w_bits, (8, 4))
        require_bits("CrossQuantConfig: a_bits", self.a_bits)
        require_one_of("CrossQuantConfig", "mode", self.mode, ("tight", "static", "auto"))
        require_one_of("CrossQuantConfig", "fold", self.fold, (True, False))
        if type(self.group_size) is not int or self.group_size < 16 or self.group_size % 16:
            raise ValueError(f"CrossQuantConfig: group_size={self.group_size!r}; a positive multiple of 16 is needed")
        if self.alpha != "search":
            require_alpha("CrossQuantConfig: alpha", self.alpha)
        if not isinstance(self.alphas, tuple) or not self.alphas:
            raise ValueError(f"CrossQuantConfig: alphas={self.alphas!r}; at least one exponent is needed")
        for alpha in self.alphas:
            require_alpha("CrossQuantConfig: alphas", alpha)
        if not isinstance(self.skip, tuple) or not all(isinstance(name, str) for name in self.skip):
            raise ValueError(f"CrossQuantConfig: skip={self.skip!r}; a tuple of module names is needed")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` restores an equal config."""
        return dataclasses.asdict(self) | {"alphas": list(self.alphas), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, raw: Any) -> CrossQuantConfig:
        """The inverse of :meth:`to_dict`; missing keys take their defaults, unknown ones raise ValueError."""
        values = strict(cls, raw)
        for name in ("alphas", "skip"):
            if name in values:
                if not isinstance(values[name], (list, tuple)):
                    raise ValueError(f"CrossQuantConfig: {name}={values[name]!r}; a list is needed")
                values[name] = tuple(values[name])
        return cls(**values)


@dataclass(frozen=True)
class CrossQuantCheckpointConfig(CrossQuantConfig):
    """The same with what the decode engine has as defaults: INT4 weights, INT8 activations."""

    w_bits: int = 4


def require_alpha(what: str, alpha: Any) -> None:
    """Raise ValueError unless alpha is a number in [0, 1]."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"{what}={alpha!r}; a number from 0 (per channel) to 1 (per token) is needed")


def require_bits(what: str, bits: Any) -> None:
    """Raise ValueError unless bits is an integer from 2 to 8."""
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"{what}={bits!r}; an integer from 2 to 8 is needed")
