# SPDX-License-Identifier: Apache-2.0
"""CrossQuant on a language model for the decode engine: columns folded, INT4 weights, INT8 activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tilewright._progress import track
from tilewright.capture import Batch, Reducer, Site, observe
from tilewright.formats import quantize_int4
from tilewright.models.language_model import LINEARS, LanguageModel, Weight
from tilewright.quantize._model import quantized, require_unquantized
from tilewright.quantize.crossquant.apply import LinearInput, crossquant_choice
from tilewright.quantize.crossquant.config import CrossQuantCheckpointConfig, CrossQuantConfig
from tilewright.quantize.crossquant.fold import Fold, Group
from tilewright.quantize.fireq.channels import CONSUMERS, scale_channels
from tilewright.reducers import AbsMax, Reservoir, Several

SAMPLE_ROWS = 128


def quantize_model(
    model: LanguageModel,
    config: CrossQuantConfig | None = None,
    calibration_batches: Iterable[Batch] | None = None,
) -> LanguageModel:
    """A new model: 1/u in norms, values and up projections, u in the columns of all linears, which become INT4.

    The engine multiplies INT4 weights by INT8 activations with a scale a token and 64 columns, so the row scale is
    "tight" whatever the config says of mode, a_bits is 8 and w_bits 4. ``model`` is not changed.

    Raises:
        ValueError: the config asks for other bits or no folding, calibration is missing or holds NaN, or the model is
            already quantized by a method.
    """
    config = config or CrossQuantCheckpointConfig()
    if (config.w_bits, config.a_bits, config.fold, config.mode) != (4, 8, True, "tight"):
        raise ValueError(
            "crossquant on a checkpoint: the engine has INT4 weights, INT8 activations and folded tight scales; set "
            "w_bits=4 and leave a_bits, fold and mode. apply_crossquant_ takes other settings on a transformers model"
        )
    require_unquantized(model)
    model.require_softmax("crossquant")
    if calibration_batches is None:
        raise ValueError("crossquant needs calibration_batches: a few thousand tokens of ordinary text")
    seen = _inputs(model, calibration_batches)
    changed: dict[str, Weight] = {}
    for layer in track(range(model.config.num_hidden_layers), "folding"):
        changed |= _fold_layer(model, layer, seen, config)
    settings = {"activations": "int8", "mode": "exact", "kv_bits": 16}
    return quantized(model, changed, method="crossquant", config=config.to_dict(), settings=settings, notes=[])


def _inputs(model: LanguageModel, batches: Iterable[Batch]) -> dict[str, LinearInput]:
    """Column maxima and a sample of the inputs of each layer, by module name of the first linear that reads them."""
    from tilewright.models import to_transformers

    reducers: dict[str | Site, Callable[[], Reducer]] = {
        f"model.layers.*.{names[0]}@input": lambda: Several(AbsMax, lambda: Reservoir(SAMPLE_ROWS))
        for names in CONSUMERS.values()
    }
    seen = observe(to_transformers(model, dequantize=True), batches, reducers, description="calibrating columns")
    return {name.removesuffix("@input"): LinearInput(*value) for name, value in seen.items()}


def _fold_layer(
    model: LanguageModel, layer: int, seen: dict[str, LinearInput], config: CrossQuantConfig
) -> dict[str, Weight]:
    """Changed weights of one layer: divided norms and biases in float, linears folded and rounded to INT4."""
    prefix = f"model.layers.{layer}."
    before = {name: model.dense(name) for name in model.weights if name.startswith(prefix)}
    weights = dict(before)
    heads, kv = model.config.num_attention_heads, model.config.num_key_value_heads
    for site, names in CONSUMERS.items():
        repeat = heads // kv if site == "attention_output" else 1
        consumers = tuple(f"{prefix}{name}" for name in names)
        group = Group(Fold(None, consumers, repeat, model.config.head_dim), None, consumers)
        floats = [before[f"{name}.weight"] for name in consumers]
        choice = crossquant_choice(group, floats, [seen[consumers[0]]], config)
        scale_channels(weights, prefix, site, group.rule.shared(choice.factor), model.config)
    changed: dict[str, Weight] = {}
    for name, weight in weights.items():
        if name.removeprefix(prefix).removesuffix(".weight") in LINEARS:
            changed[name] = quantize_int4(weight, config.group_size)
        elif weight is not before[name]:
            changed[name] = weight
    return changed
