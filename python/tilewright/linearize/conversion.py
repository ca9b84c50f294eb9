# SPDX-License-Identifier: Apache-2.0
"""Replacing the attention of chosen layers of a transformers model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from tilewright.linearize import Method, method
from tilewright.linearize.attention import ConvertedAttention, require_known

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RECORD = "tilewright_linearization"


@dataclass(frozen=True)
class Linearization:
    """What was done to a model: a method's name, its config, and the layers it replaced."""

    method: str
    config: Any
    layers: tuple[int, ...]


def layers_to_convert(
    count: int, layers: str | Iterable[int] = "all", keep: Iterable[int] = (), keep_every: int | None = None
) -> tuple[int, ...]:
    """Which of ``count`` layers to convert.

    Args:
        layers: "all", or indices; negative ones count from the end.
        keep: indices of layers that keep their softmax attention.
        keep_every: n keeps layers n-1, 2n-1, ... (one in n).

    Raises:
        ValueError: an index out of range or given twice, or nothing is left to convert.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers = {layers!r}; needed 'all' or indices in 0..{count - 1}")
        chosen = list(range(count))
    else:
        chosen = _indices("layers", layers, count)
    if keep_every is not None and keep_every < 2:
        raise ValueError(f"keep_every = {keep_every}; needed None or at least 2 (8 keeps layers 7, 15, ...)")
    kept = set(_indices("keep", keep, count))
    if keep_every:
        kept |= set(range(keep_every - 1, count, keep_every))
    left = tuple(sorted(set(chosen) - kept))
    if not left:
        raise ValueError("no layer is left to convert; keep fewer or name more")
    return left


def _indices(name: str, values: Iterable[int], count: int) -> list[int]:
    found: list[int] = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not -count <= value < count:
            raise ValueError(f"{name} holds {value!r}; indices in {-count}..{count - 1} are needed")
        if value % count in found:
            raise ValueError(f"{name} names layer {value % count} twice")
        found.append(value % count)
    return found


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers causal language model.

    Raises:
        ValueError: the model has no ``model.layers`` with ``self_attn`` in each.
    """
    layers = getattr(getattr(model, "model", model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(
            f"{type(model).__name__} has no model.layers with self_attn in each; a transformers model of the Llama, "
            "Mistral, Qwen2 or Qwen3 type is needed"
        )
    return layers


def convert(
    model: PreTrainedModel,
    how: str | Method,
    config: Any = None,
    *,
    layers: str | Iterable[int] = "all",
    keep: Iterable[int] = (),
    keep_every: int | None = None,
    inplace: bool = False,
) -> PreTrainedModel:
    """Replace the attention of chosen layers by a method's module; the projections stay.

    Args:
        model: a transformers Llama, Mistral, Qwen2 or Qwen3 causal language model with float weights
            (``tilewright.models.to_transformers(model, dequantize=True)`` makes one).
        how: a method or its name.
        config: an instance of the method's config; its defaults when None.
        layers, keep, keep_every: as for :func:`layers_to_convert`.
        inplace: change ``model`` itself; else a copy of it.

    Raises:
        ValueError: attention of an unknown class (named), a model already converted, or a wrong layer. The model is
            then as before.
    """
    chosen = method(how) if isinstance(how, str) else how
    config = chosen.config() if config is None else config
    if not isinstance(config, chosen.config):
        raise ValueError(
            f"config is a {type(config).__name__}; method {chosen.name!r} needs a {chosen.config.__name__}"
        )
    if linearization(model) is not None:
        raise ValueError("the model is already linearized; start from the original one")
    blocks: Any = decoder_layers(model)
    for block in blocks:
        require_known(block.self_attn)
    indices = layers_to_convert(len(blocks), layers, keep, keep_every)
    if not inplace:
        model = copy.deepcopy(model)
        blocks = decoder_layers(model)
    made = [(blocks[i], chosen.attention(blocks[i].self_attn, config)) for i in indices]
    for block, attention in made:
        block.self_attn = attention.train(block.self_attn.training)
    setattr(model, _RECORD, Linearization(chosen.name, config, indices))
    return model


def linearization(model: nn.Module) -> Linearization | None:
    """What :func:`convert` did to this model; None for any other."""
    return getattr(model, _RECORD, None)


def converted_layers(model: nn.Module) -> dict[int, ConvertedAttention]:
    """The converted modules by layer index."""
    blocks: Any = decoder_layers(model)
    return {i: b.self_attn for i, b in enumerate(blocks) if isinstance(b.self_attn, ConvertedAttention)}
