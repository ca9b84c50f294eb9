# SPDX-License-Identifier: Apache-2.0
"""A linearized model for the native decode engine: one operator call a token, a state of constant size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilewright.linearize.attention import ConvertedAttention
from tilewright.linearize.conversion import converted_layers
from tilewright.models.config import LlamaConfig
from tilewright.models.language_model import LanguageModel, Weight, expected_shapes
from tilewright.models.mixers import LinearMixer

if TYPE_CHECKING:
    from tilewright.linearize.checkpoint import LinearizedModel


def to_language_model(loaded: LinearizedModel) -> LanguageModel:
    """The same weights and layers as :class:`tilewright.models.engine.Engine` takes them.

    The engine rounds float matrices to bfloat16; its state is float32, as in torch.

    Raises:
        ValueError: the engine has no form of a converted layer, or not this architecture (Qwen3);
            :class:`tilewright.linearize.runner.Runner` runs any.
    """
    model = loaded.model
    config = LlamaConfig.from_transformers(model.config.to_dict())
    state = model.state_dict()
    weights: dict[str, Weight] = {name: state[name] for name in expected_shapes(config)}
    mixers: dict[int, LinearMixer] = {}
    for index, layer in converted_layers(model).items():
        mixers[index], parameters = _mixer(index, layer)
        weights |= parameters
    return LanguageModel(
        config, weights, source=loaded.source, mixers=mixers, tokenizer_factory=loaded.tokenizer_factory
    )


def _mixer(index: int, layer: ConvertedAttention) -> tuple[LinearMixer, dict[str, Weight]]:
    made = layer.engine_mixer(f"model.layers.{index}.self_attn.")
    if made is None:
        raise ValueError(
            f"the decode engine has no form of layer {index}, {type(layer).__name__}({layer.extra_repr()}); "
            "tilewright.linearize.runner.Runner runs it"
        )
    return made[0], dict(made[1])
