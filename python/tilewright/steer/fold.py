# SPDX-License-Identifier: Apache-2.0
"""Activation maps written into the weights of the modules that make the activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tilewright.capture import ActivationMap

# Who reads the output of a norm that has no bias of its own, in the Llama family: the map's b becomes their W b.
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
# float32 rounding of a norm's output through the map, twice, is below this many units of its size.
_TOLERANCE = 2.0**-18


def fold_(model: nn.Module, maps: dict[str, ActivationMap]) -> None:
    """Make the model compute with the maps, in place: a norm's gain or a linear's rows times w, b into a bias.

    A norm with a bias and a linear take w and b themselves. A norm without one (RMSNorm) takes w; b goes as W b into
    the biases of the linears that read it, known for Llama's names.

    Raises:
        ValueError: a map sits where nothing can take it (a block's output, an input, a module that is no float norm or
            linear, a norm whose readers are not known); nothing is changed then.
    """
    places = [(name, model.get_submodule(_output(name)), *one.affine()) for name, one in maps.items()]
    for name, module, _, _ in places:
        _require_foldable(model, name, module)
    for name, module, w, b in places:
        with torch.no_grad():
            if isinstance(module, nn.Linear):
                _into_linear(module, w, b)
            else:
                _into_norm(model, name, module, w, b)


def _output(name: str) -> str:
    if name.endswith("@input"):
        raise ValueError(f"fold: {name} is an input; maps fold into the module that makes an activation")
    return name


def _readers(model: nn.Module, name: str) -> list[nn.Linear]:
    at, _, leaf = name.rpartition(".")
    found = [dict(model.named_modules()).get(f"{at}.{reader}") for reader in _READERS.get(leaf, ())]
    return [one for one in found if isinstance(one, nn.Linear)] if all(isinstance(f, nn.Linear) for f in found) else []


def _require_foldable(model: nn.Module, name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        return
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        raise ValueError(
            f"fold: {name} is a {type(module).__name__}, not a float norm or linear; keep the map as a hook "
            "(Steering.transform) or give it to the engine (Steering.attach)"
        )
    probe = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        before = module(probe)
        kept = weight.clone()
        weight.mul_(2)
        doubled = module(probe)
        weight.copy_(kept)
    bias = getattr(module, "bias", None)
    expected = 2 * before - (bias if isinstance(bias, Tensor) else 0)
    if not bool(((doubled - expected).abs() <= _TOLERANCE * before.abs().amax()).all()):
        raise ValueError(
            f"fold: {name}: {type(module).__name__} does not multiply by its weight; keep the map as a hook"
        )
    if not isinstance(bias, Tensor) and not _readers(model, name):
        raise ValueError(f"fold: {name} has no bias, and who reads its output is not known; keep the map as a hook")


def _into_linear(linear: nn.Linear, w: Tensor, b: Tensor) -> None:
    linear.weight.mul_(w.to(linear.weight)[:, None])
    own = torch.zeros_like(b) if linear.bias is None else linear.bias * w.to(linear.bias)
    _set_bias(linear, own + b.to(own))


def _into_norm(model: nn.Module, name: str, module: nn.Module, w: Tensor, b: Tensor) -> None:
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    weight.mul_(w.to(weight))
    if isinstance(bias, Tensor):
        bias.mul_(w.to(bias)).add_(b.to(bias))
        return
    for reader in _readers(model, name):
        moved = reader.weight @ b.to(reader.weight)
        _set_bias(reader, moved if reader.bias is None else reader.bias + moved)


def _set_bias(linear: nn.Linear, bias: Tensor) -> None:
    linear.bias = nn.Parameter(bias.to(linear.weight), requires_grad=linear.weight.requires_grad)
