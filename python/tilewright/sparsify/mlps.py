# SPDX-License-Identifier: Apache-2.0
"""The gated MLPs of a torch model, by name: what thresholds belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tilewright.nn.cats_mlp import CATSMLP, Act, act_name


@dataclass(frozen=True)
class Names:
    """What the parts of an MLP are called; ``act`` may be an attribute that holds a module or a function."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    act: str = "act_fn"


LLAMA = Names()


@dataclass(frozen=True)
class GatedMLP:
    """One gated MLP ``down(act(gate(x)) * up(x))`` of a model."""

    name: str
    module: nn.Module
    names: Names
    act: Act

    @property
    def gate(self) -> nn.Module:
        return self.module.get_submodule(self.names.gate)

    @property
    def up(self) -> nn.Module:
        return self.module.get_submodule(self.names.up)

    @property
    def down(self) -> nn.Module:
        return self.module.get_submodule(self.names.down)

    def site(self, part: str, side: str = "output") -> str:
        """The capture site of "gate", "up" or "down"."""
        name = f"{self.name}.{getattr(self.names, part)}".lstrip(".").replace(".", r"\.")
        return f"re:{name}@{side}"

    def down_norms(self) -> Tensor:
        """||W_down[:, j]|| of each neuron, float64 [M]."""
        layer: Any = getattr(self.down, "base_layer", self.down)
        return layer.weight.detach().double().norm(dim=0)


def gated_mlps(model: nn.Module, names: Names | Mapping[str, Names] | None = None) -> dict[str, GatedMLP]:
    """All gated MLPs of ``model`` by module name, in order.

    names: what their parts are called, the same for all modules that have such parts (None: as in transformers' Llama,
        Mistral, Gemma, Qwen and SmolLM), or the parts of each module by its name.

    Raises:
        ValueError: there is none (the first MLP without a gate is named), a named module lacks a part, or its
        activation
            is none of silu, gelu, gelu_tanh, relu.
    """
    if isinstance(names, Mapping):
        return {name: _gated(name, model.get_submodule(name), one) for name, one in names.items()}
    parts = names or LLAMA
    found = {
        name: _gated(name, module, parts)
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, part, None), nn.Module) for part in (parts.gate, parts.up, parts.down))
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no gated MLP with {parts.gate}, {parts.up} and {parts.down}{_ungated(model)}; "
            "give the names of its parts"
        )
    return found


def _gated(name: str, module: nn.Module, names: Names) -> GatedMLP:
    for part in (names.gate, names.up, names.down):
        if not isinstance(getattr(module, part, None), nn.Module):
            raise ValueError(f"{name} ({type(module).__name__}) has no {part}: it is no gated MLP, which CATS needs")
    if isinstance(module, CATSMLP):
        return GatedMLP(name, module, names, module.act)
    function = getattr(module, names.act, None) or getattr(module, "act", None)
    try:
        return GatedMLP(name, module, names, act_name(function))
    except ValueError as wrong:
        raise ValueError(f"{name}: {wrong}") from None


def _ungated(model: nn.Module) -> str:
    """Says which module looks like an MLP without a gate, if one does."""
    for name, module in model.named_modules():
        children = {child for child, _ in module.named_children()}
        if {"fc1", "fc2"} <= children or {"c_fc", "c_proj"} <= children or {"up_proj", "down_proj"} <= children:
            return f" ({name} is an MLP without a gate)"
    return ""
