# SPDX-License-Identifier: Apache-2.0
"""Whole models: float linears to BitLinear for training, BitLinear to packed weights afterwards."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from tilewright.formats.ternary import TernaryFormat
from tilewright.nn.bitnet.linear import BitLinear

HEAD = "lm_head"


def replace_with_bitlinear(
    model: nn.Module, skip: Collection[str] = (HEAD,), *, norm_eps: float | None = None
) -> list[str]:
    """Make a BitLinear of every ``nn.Linear`` of a model, in place; weights and biases stay the same parameters.

    Args:
        model: any module; the module itself is not replaced.
        skip: names, or last parts of names, of linears that stay as they are: the output head, as in BitNet.
        norm_eps: see :class:`BitLinear`; None: the model has its own norms.

    Returns:
        Names of the replaced layers.

    Raises:
        ValueError: there is no linear to replace.
    """
    found = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name and name not in skip and name.rpartition(".")[2] not in skip
    ]
    if not found:
        raise ValueError(f"replace_with_bitlinear: {type(model).__name__} has no nn.Linear outside {sorted(skip)}")
    for name in found:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_module(leaf, BitLinear.from_linear(linear, norm_eps=norm_eps))
    return found


def pack_bitlinears(model: nn.Module, format: TernaryFormat = "q2") -> list[str]:
    """Pack every BitLinear of a model, in place; the names of those that were not packed yet."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BitLinear) and not m.is_packed}
    for layer in layers.values():
        layer.pack_(format)
    return list(layers)
