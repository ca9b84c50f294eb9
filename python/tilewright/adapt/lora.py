# SPDX-License-Identifier: Apache-2.0
"""LoRA: a low-rank update of frozen linear layers, W + (alpha / r) B A (Hu et al., arXiv 2106.09685).

Field names of the configuration and parameter names in files are those of peft, so that its adapters of plain linear
layers can be read here and ours there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tilewright._files import atomic_directory

M = TypeVar("M", bound=nn.Module)

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Fields of a peft configuration that ask for another layer than ours, and the value that does not.
_PLAIN = {
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter, by peft's names.

    r: rank. lora_alpha: the update is scaled by lora_alpha / r. lora_dropout: probability of dropping an input of A in
    training. target_modules: last parts of the names of the layers to adapt.

    Raises:
        ValueError: a value that cannot be right; the message names the field.
    """

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"LoraConfig: r = {self.r!r}; a whole number of at least 1 is needed")
        if not (isinstance(self.lora_alpha, (int, float)) and math.isfinite(self.lora_alpha)):
            raise ValueError(f"LoraConfig: lora_alpha = {self.lora_alpha!r}; a finite number is needed")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoraConfig: lora_dropout = {self.lora_dropout!r}; a number in [0, 1) is needed")
        if not self.target_modules or not all(isinstance(name, str) and name for name in self.target_modules):
            raise ValueError(f"LoraConfig: target_modules = {self.target_modules!r}; names of layers are needed")

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.lora_alpha / self.r


class LoraLinear(nn.Module):
    """y = base(x) + scaling * B(A(dropout(x))), A [r, in] and B [out, r] in float32 unless the base is float64.

    A starts uniform as torch's own linear layers do, B at zero, so that the layer starts as the base.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, config.scaling
        kind = torch.promote_types(base.weight.dtype, torch.float32)
        options: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": kind}
        self.lora_A = nn.Linear(base.in_features, config.r, **options)
        self.lora_B = nn.Linear(config.r, base.out_features, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()

    @property
    def in_features(self) -> int:
        """Of the base layer."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Of the base layer."""
        return self.base_layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the base layer's dtype."""
        out: Tensor = self.base_layer(x)
        update = self.lora_B(self.lora_A(self.lora_dropout(x.to(self.lora_A.weight.dtype))))
        return out + (update * self.scaling).to(out.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the update added to its weight."""
        update = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        weight = self.base_layer.weight
        weight.copy_((weight.to(update.dtype) + update).to(weight.dtype))
        return self.base_layer


def apply_lora(
    model: M,
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    r: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.0,
    *,
    within: Sequence[str] = (),
) -> M:
    """Put adapters on linear layers, in place; afterwards only the adapters are trainable.

    Args:
        targets: last part of the names of the layers to adapt.
        within: adapt only below modules of these full names; empty: anywhere.

    Raises:
        ValueError: a setting cannot be right, a target is found nowhere, or is no ``nn.Linear``, or has an adapter.
    """
    config = LoraConfig(r, float(alpha), float(dropout), tuple(targets))
    chosen = _targets(model, config.target_modules, within)
    model.requires_grad_(False)
    for parent, leaf, layer in chosen:
        parent.register_module(leaf, LoraLinear(layer, config))
    _remember(model, config)
    return model


def _targets(
    model: nn.Module, targets: Sequence[str], within: Sequence[str] = ()
) -> list[tuple[nn.Module, str, nn.Linear]]:
    chosen: list[tuple[nn.Module, str, nn.Linear]] = []
    found: set[str] = set()
    for name, module in model.named_modules():
        place, _, leaf = name.rpartition(".")
        if leaf not in targets or (within and not any(f"{name}.".startswith(f"{w}.") for w in within)):
            continue
        if isinstance(module, LoraLinear):
            raise ValueError(f"{name} already has an adapter; merge it first (merge_lora)")
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is a {type(module).__name__}; an adapter needs a torch.nn.Linear")
        found.add(leaf)
        chosen.append((model.get_submodule(place), leaf, module))
    if missing := [name for name in targets if name not in found]:
        raise ValueError(f"no layer is called {missing[0]!r}; adapters need names like 'q_proj'")
    return chosen


_RECORD = "tilewright_lora"


def _remember(model: nn.Module, config: LoraConfig | None) -> None:
    setattr(model, _RECORD, config)


def lora_config(model: nn.Module) -> LoraConfig | None:
    """Settings of the adapters that :func:`apply_lora` put on this model; None without any."""
    return getattr(model, _RECORD, None)


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """All adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The adapters' parameters."""
    for layer in adapted_layers(model).values():
        yield from layer.lora_A.parameters()
        yield from layer.lora_B.parameters()


def merge_lora(model: M) -> M:
    """Add every adapter to its layer's weight and remove it, in place; the model's function stays.

    Raises:
        ValueError: there is no adapter.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter to merge")
    for name, layer in layers.items():
        place, _, leaf = name.rpartition(".")
        model.get_submodule(place).register_module(leaf, layer.merged())
    _remember(model, None)
    return model


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by peft's names."""
    state = {}
    for name, layer in adapted_layers(model).items():
        state[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.weight.detach()
        state[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.weight.detach()
    return state


def save_lora(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write the adapters as a folder in peft's form; it appears complete or not at all.

    Raises:
        ValueError: the model has no adapter. FileExistsError: the folder holds something else.
    """
    from safetensors.torch import save_file

    config, target = lora_config(model), Path(directory)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no adapter to save")
    foreign = sorted({p.name for p in target.iterdir()} - {_CONFIG, _WEIGHTS}) if target.exists() else []
    if foreign:
        raise FileExistsError(f"{target}: holds {foreign[0]!r}, which is not part of an adapter")
    fields = asdict(config) | {"target_modules": list(config.target_modules)}
    fields = {"peft_type": "LORA", "base_model_name_or_path": None} | fields | _PLAIN
    with atomic_directory(target) as folder:
        (folder / _CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        tensors = {name: t.cpu().contiguous() for name, t in lora_state(model).items()}
        save_file(tensors, str(folder / _WEIGHTS), metadata={"format": "pt"})
    return target


def load_lora(model: M, directory: str | os.PathLike[str]) -> M:
    """Put saved adapters (ours or peft's) on a model that has none, in place.

    Raises:
        ValueError: the folder asks for something other than plain LoRA, or does not fit the model; the message names
            the field or tensor. FileNotFoundError: a file of the folder is missing.
    """
    from safetensors.torch import load_file

    place = Path(directory)
    raw = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise ValueError(f"{_CONFIG}: peft_type must be 'LORA'")
    for key, plain in _PLAIN.items():
        if raw.get(key, plain) not in (plain, None):
            raise ValueError(f"{_CONFIG}: {key} = {str(raw[key])[:60]} is not supported; {plain!r} is")
    names = ("r", "lora_alpha", "lora_dropout", "target_modules")
    if missing := [name for name in names if name not in raw]:
        raise ValueError(f"{_CONFIG}: {missing[0]} is missing")
    if not isinstance(raw["target_modules"], list):
        raise ValueError(f"{_CONFIG}: target_modules must be a list of names")
    config = LoraConfig(**{name: raw[name] for name in names})
    tensors = load_file(str(place / _WEIGHTS))
    within = sorted({_owner(name) for name in tensors})
    apply_lora(model, config.target_modules, config.r, config.lora_alpha, config.lora_dropout, within=within)
    fill_lora(model, tensors)
    return model


def _owner(name: str) -> str:
    """The adapted layer of a tensor's name."""
    owner, found, rest = name.removeprefix(_PREFIX).partition(".lora_")
    if not found or rest not in ("A.weight", "B.weight") or not name.startswith(_PREFIX):
        raise ValueError(f"{_WEIGHTS}: tensor {name[:120]!r} is not of plain LoRA")
    return owner


@torch.no_grad()
def fill_lora(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of :func:`lora_state` into a model's adapters.

    Raises:
        ValueError: a tensor is missing, too many or of another shape; the message names it.
    """
    state = lora_state(model)
    for name in sorted(state.keys() ^ tensors.keys()):
        what = "is missing" if name in state else "has no layer in this model"
        raise ValueError(f"adapter: tensor {name[:120]!r} {what}")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"adapter: tensor {name!r} has shape {list(tensor.shape)}, needed {list(state[name].shape)}"
            )
        state[name].copy_(tensor)
