# SPDX-License-Identifier: Apache-2.0
"""Feed-forward blocks of a model: which linear makes the output, and where the gate's activation is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.capture import resolve

# Names that transformers' decoders give to Wo; all but the first belong to blocks without a gate.
_GATED = "down_proj"
_PLAIN = (r"(.+\.)?fc2", r"(.+\.)?mlp\.c_proj", r"(.+\.)?mlp\.dense_4h_to_h", r"(.+\.)?mlp\.fc_out")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block ``FFN(x) = Wo h``, with ``h = s * (Wi x)``, ``s = act(Wg x)``, or ``h = s = act(Wi x)``.

    name: what the block is called in results and files, mostly the module that holds it.
    down: the module Wo; its input is h [..., m], whatever the activation.
    gate: the site of s (see :mod:`tilewright.capture`); None when the block has no gate, or when none was found.
    act: applied to what ``gate`` names to get s, where no module of the model does it; act(0) must be 0.
    gated: whether h is a product, so that s is not h.
    """

    name: str
    down: str
    gate: str | None = None
    act: Callable[[Tensor], Tensor] | None = None
    gated: bool = True

    @property
    def gate_site(self) -> tuple[str, Callable[[Tensor], Tensor] | None]:
        """Where s is seen, and the function that gives it.

        Raises:
            ValueError: the block is gated and its activation is no module.
        """
        if not self.gated:
            return f"{self.down}@input", None
        if self.gate is None:
            raise ValueError(
                f"{self.name}: no module gives the gate's activation, which this metric thresholds; use a CETT metric, "
                "or name it: layers=[FeedForward(name, down, gate='...gate_proj@output', act=torch.nn.functional.silu)]"
            )
        return self.gate, self.act


def feed_forwards(model: nn.Module, layers: Iterable[str | FeedForward] | None = None) -> list[FeedForward]:
    """The blocks of a model, in its order.

    layers: blocks, or site patterns of their down projections ("model.layers.*.mlp.down_proj"); None: all modules with
        a usual name (down_proj; fc2 of OPT, c_proj of GPT-2, dense_4h_to_h of NeoX, fc_out of GPT-J).

    Raises:
        ValueError: there is none, a pattern matches nothing, a down projection holds no float matrix (low-bit layers,
            fused experts), or it belongs to an expert, which sees only some tokens.
    """
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r}: a list of patterns or FeedForward blocks is needed")
    found: list[FeedForward] = []
    if layers is None:
        names = [name for name, _ in model.named_modules() if _is_down(name)]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no module named down_proj, fc2, mlp.c_proj, mlp.dense_4h_to_h or "
                "mlp.fc_out; name the down projections: layers=['**.w2']"
            )
        found = [_block(model, name) for name in names]
    else:
        for layer in layers:
            if isinstance(layer, FeedForward):
                found.append(layer)
            else:
                found += [_block(model, point.module_name) for point in resolve(model, layer)]
        if not found:
            raise ValueError("layers is empty; give at least one, or None for all")
    for block in found:
        if "expert" in block.down:
            raise ValueError(
                f"{block.down}: an expert of a mixture sees only some tokens, so its neurons have no ratio over all "
                "of them; leave it out of layers"
            )
        output_weight(model, block)
    return found


def _is_down(name: str) -> bool:
    return name.rpartition(".")[2] == _GATED or any(re.fullmatch(pattern, name) for pattern in _PLAIN)


def _block(model: nn.Module, down: str) -> FeedForward:
    parent, _, child = down.rpartition(".")
    holder: Any = model.get_submodule(parent)
    siblings = dict(holder.named_children())
    gated = child == _GATED or "gate_proj" in siblings
    prefix = f"{parent}." if parent else ""
    name = parent or child
    if not gated:
        return FeedForward(name, down, gated=False)
    for one in _ACTIVATIONS:
        if one in siblings:
            return FeedForward(name, down, f"{prefix}{one}@output")
    if "gate_proj" in siblings and _computes_silu(holder):
        return FeedForward(name, down, f"{prefix}gate_proj@output", F.silu)
    return FeedForward(name, down)


def _computes_silu(holder: nn.Module) -> bool:
    """Whether it is one of our own blocks, which apply SiLU inside their forward."""
    kind = type(holder)
    return kind.__module__.startswith("tilewright.") and kind.__name__ in ("GatedMLP", "SwiGLU")


def output_weight(model: nn.Module, block: FeedForward) -> Tensor:
    """Wo [d, m] in float32 (float64 stays).

    Raises:
        ValueError: the module is no linear with a float matrix.
    """
    try:
        module: Any = model.get_submodule(block.down)
    except AttributeError as wrong:
        raise ValueError(f"{block.down}: the model has no such module") from wrong
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{block.down} is a {type(module).__name__} without a float matrix; a linear layer is needed "
            "(to_transformers(model, dequantize=True) makes low-bit layers float)"
        )
    weight = weight.detach()
    weight = weight.T if type(module).__name__ == "Conv1D" else weight
    return weight if weight.dtype == torch.float64 else weight.float()


def column_norms(weight: Tensor) -> Tensor:
    """||Wo[:, i]|| of each neuron [m], summed in float64, in the weight's dtype."""
    return torch.linalg.vector_norm(weight.double(), dim=0).to(weight.dtype)


def neuron_thresholds(eps: float, norms: Tensor) -> Tensor:
    """The bound on |h_i| of each neuron, eps / ||Wo[:, i]|| [m]; infinite where the column is zero."""
    return torch.where(norms > 0, eps / norms, torch.full_like(norms, torch.inf))
