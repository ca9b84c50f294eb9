# SPDX-License-Identifier: Apache-2.0
"""BitNet checkpoints in transformers' layout, and the first ones, whose weights are rounded when they run.

transformers (its ``quantization_config`` has quant_method "bitnet") stores a linear in one of three ways:

- packed: uint8 [N/4, K], row i * N/4 + r in bits 2i of row r, value + 1, and ``weight_scale`` [1];
- unpacked: the values -1, 0, 1 as floats, and ``weight_scale``;
- latent: floats that are rounded by their mean magnitude in each call (quantization_mode "online").

The layer class says what ``weight_scale`` is: "bitlinear" (the default) divides by it, "autobitlinear" multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.formats.ternary import PackedTernary, TernaryFormat, pack_ternary, quantize_ternary, wrap_ternary
from tilewright.models.config import LlamaConfig
from tilewright.models.errors import CheckpointError
from tilewright.models.language_model import Weight, expected_shapes, linear_names

_HELD: TernaryFormat = "q2"
_SUB_NORMS = {"self_attn.inner_attn_ln": "self_attn.attn_sub_norm", "mlp.ffn_layernorm": "mlp.ffn_sub_norm"}
_DIVIDES, _MULTIPLIES = "bitlinear", "autobitlinear"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def import_bitnet(
    quantization: dict[str, Any], tensors: dict[str, Tensor], config: LlamaConfig, notes: list[str]
) -> dict[str, Weight]:
    """The weights of a transformers checkpoint with quant_method "bitnet", under plain parameter names.

    Raises:
        CheckpointError: an option that is not supported, or a tensor that does not fit it.
    """
    linear_class = quantization.get("linear_class") or _DIVIDES
    mode = quantization.get("quantization_mode") or "offline"
    for name, value, known in (
        ("linear_class", linear_class, (_DIVIDES, _MULTIPLIES)),
        ("quantization_mode", mode, ("offline", "online")),
    ):
        if value not in known:
            raise CheckpointError(f"bitnet: {name}={str(value)[:40]!r} is not supported; {' and '.join(known)} are")
    if quantization.get("use_rms_norm"):
        raise CheckpointError(
            "bitnet: use_rms_norm gives every linear a norm of its own, which is not supported; norms of the "
            "architecture (model_type 'bitnet') are"
        )
    kept = _not_converted(quantization)
    weights: dict[str, Weight] = dict(tensors)
    shapes = expected_shapes(config)
    done = 0
    for name in linear_names(config):
        if name not in tensors or any(part in name for part in kept):
            continue
        rows, columns = shapes[name]
        scale = weights.pop(name + "_scale", None)
        assert scale is None or isinstance(scale, Tensor)
        if mode == "online" and linear_class == _MULTIPLIES:
            weights[name] = latent(name, tensors[name])
        else:
            weights[name] = _stored(name, tensors[name], (rows, columns), _weight_scale(name, scale, linear_class))
        done += 1
    if not done:
        raise CheckpointError("quantization_config says 'bitnet', but no tensor of that kind is there")
    notes.append(f"{done} ternary matrices; their inputs are rounded to INT8 with one scale a token")
    return weights


def import_first_bitnet(tensors: dict[str, Tensor], config: LlamaConfig, notes: list[str]) -> dict[str, Weight]:
    """The weights of bitnet_b1_58-large and -3B: latent floats, and sub-norms under names of their own."""
    weights: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        for theirs, ours in _SUB_NORMS.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor
    for name in linear_names(config):
        weight = weights.get(name)
        if isinstance(weight, Tensor):
            weights[name] = latent(name, weight)
    notes.append("weights were rounded to ternary values by their mean magnitude, as the model does when it runs")
    return weights


def latent(name: str, weight: Tensor) -> PackedTernary:
    """A float weight rounded by its mean magnitude.

    Raises:
        CheckpointError: it is no float matrix, or not finite.
    """
    if weight.dtype not in _FLOATS:
        raise CheckpointError(f"tensor {name!r} is {weight.dtype}; the latent weights of an online BitNet are floats")
    try:
        codes, scale = quantize_ternary(weight)
    except ValueError as wrong:
        raise CheckpointError(f"tensor {name!r}: {wrong}") from None
    return pack_ternary(codes, _HELD, scale=scale)


def _not_converted(quantization: dict[str, Any]) -> list[str]:
    names = quantization.get("modules_to_not_convert") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError("bitnet: modules_to_not_convert must be a list of names")
    return names


def _weight_scale(name: str, scale: Tensor | None, linear_class: str) -> float:
    if scale is None:
        raise CheckpointError(f"tensor {name + '_scale'!r} is missing")
    if scale.numel() != 1 or not scale.is_floating_point():
        raise CheckpointError(f"tensor {name + '_scale'!r} is {scale.dtype} {list(scale.shape)}; one float is needed")
    value = float(scale.float())
    if not (value > 0 and value < float("inf")):
        raise CheckpointError(f"tensor {name + '_scale'!r} is {value}; a positive number is needed")
    return value if linear_class == _MULTIPLIES else 1.0 / value


def _stored(name: str, weight: Tensor, shape: tuple[int, int], scale: float) -> PackedTernary:
    """A packed or unpacked weight."""
    packed_shape = (-(-shape[0] // 4), shape[1])
    if weight.dtype == torch.uint8 and tuple(weight.shape) == packed_shape:
        try:
            return wrap_ternary(weight, shape, "hf", scale).convert(_HELD)
        except RuntimeError as wrong:
            raise CheckpointError(f"tensor {name!r}: {wrong}") from None
    if weight.is_floating_point() and tuple(weight.shape) == shape:
        values = weight.float()
        if not bool(((values == 0) | (values.abs() == 1)).all()):
            raise CheckpointError(
                f"tensor {name!r} holds other values than -1, 0 and 1; latent weights need quantization_mode 'online'"
            )
        return pack_ternary(values.to(torch.int8), _HELD, scale=scale)
    raise CheckpointError(
        f"tensor {name!r} is {weight.dtype} {list(weight.shape)}; uint8 {list(packed_shape)} or floats {list(shape)} "
        "are needed"
    )
