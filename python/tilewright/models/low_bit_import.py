# SPDX-License-Identifier: Apache-2.0
"""GPTQ, AWQ, compressed-tensors and FBGEMM checkpoints: the stored integers and scales, re-ordered and nothing else.

All three 4-bit kinds hold value = (code - zero) * scale with a code and a zero in 0..15:

- GPTQ: int32 words along K, lowest nibble first; version 1 stores zero - 1, version 2 the zero itself.
- AWQ (GEMM): int32 words along N whose nibbles hold columns 0 2 4 6 1 3 5 7.
- compressed-tensors: int32 words along K; signed values offset by 8, zeros packed along N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.formats.int4 import Int4Weight
from tilewright.models.config import LlamaConfig
from tilewright.models.errors import CheckpointError
from tilewright.models.language_model import Weight, expected_shapes

_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_METHODS = "gptq, awq, bitnet, compressed-tensors (pack-quantized, float-quantized) and fbgemm_fp8"


def import_low_bit(
    quantization: Any, tensors: dict[str, Tensor], config: LlamaConfig, notes: list[str]
) -> dict[str, Weight]:
    """Turn the tensors of a quantized transformers checkpoint into weights under plain parameter names.

    Raises:
        CheckpointError: an unsupported method or option, or parts of a tensor that do not fit together.
    """
    if not isinstance(quantization, dict):
        raise CheckpointError(f"quantization_config must be an object, got {type(quantization).__name__}")
    method = quantization.get("quant_method")
    if method == "bitnet":
        from tilewright.models.bitnet_import import import_bitnet

        return import_bitnet(quantization, tensors, config, notes)
    expected = expected_shapes(config)
    parts = _Parts(dict(tensors), expected)
    if method == "gptq":
        weights = _import_gptq(quantization, parts)
    elif method == "awq":
        weights = _import_awq(quantization, parts)
    elif method == "compressed-tensors" and quantization.get("format") == "pack-quantized":
        weights = _import_compressed(quantization, parts, notes)
    elif method == "fbgemm_fp8" or (method == "compressed-tensors" and quantization.get("format") == "float-quantized"):
        weights = _import_fp8(parts, notes)
    else:
        kind = f"{method!r}" + (
            f" with format {str(quantization.get('format'))[:40]!r}" if "format" in quantization else ""
        )
        raise CheckpointError(f"quantization method {kind} is not supported; supported are {_METHODS}")
    if not weights:
        raise CheckpointError(f"quantization_config says {method!r}, but no tensor of that kind is there")
    rest = {name: t for name, t in parts.tensors.items() if not _is_empty_bias(name, t, expected)}
    return {**rest, **weights}


def _is_empty_bias(name: str, tensor: Tensor, expected: dict[str, tuple[int, ...]]) -> bool:
    """Some writers add a bias of zeros to every linear."""
    return name.endswith(".bias") and name not in expected and not bool(tensor.count_nonzero())


class _Parts:
    """The tensors not yet consumed, with checked access to the parts of one linear."""

    def __init__(self, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
        self.tensors, self.expected = tensors, expected

    def stems(self, suffix: str) -> list[str]:
        return [name[: -len(suffix)] for name in self.tensors if name.endswith(suffix)]

    def shape(self, stem: str) -> tuple[int, int]:
        """(N, K) that the architecture gives this linear."""
        shape = self.expected.get(stem + ".weight")
        if shape is None or len(shape) != 2:
            raise CheckpointError(f"tensor {stem[:120]!r} is quantized, but is no matrix of this architecture")
        return shape[0], shape[1]

    def take(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise CheckpointError(f"tensor {name!r} is missing")
        if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
            need = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise CheckpointError(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}; {need} {list(shape)} is needed"
            )
        return tensor

    def drop_sequential_index(self, name: str, k: int, group: int) -> None:
        """Consume a g_idx that says what is true anyway; any other order cannot be represented."""
        index = self.tensors.pop(name, None)
        if index is None:
            return
        if tuple(index.shape) != (k,) or not torch.equal(index.to(torch.int64), torch.arange(k) // group):
            raise CheckpointError(
                f"tensor {name!r} assigns columns to groups out of order (desc_act / actorder='group'), which is "
                "not supported; "
                "quantize with desc_act=False or with actorder='weight', which keep groups consecutive"
            )


def _group_size(raw: Any, k: int, where: str) -> tuple[int, int]:
    """(group size that Int4Weight takes, number of groups) for a stated group size; -1 or None is per channel."""
    per_channel = -(-k // 16) * 16
    if raw in (-1, None):
        return per_channel, 1
    if isinstance(raw, bool) or not isinstance(raw, int) or raw < 16 or raw % 16:
        raise CheckpointError(
            f"{where}: group_size={str(raw)[:40]} must be a multiple of 16, or -1 for one group per channel"
        )
    return (per_channel, 1) if raw >= k else (raw, -(-k // raw))


def _require_bits(raw: Any, where: str) -> None:
    if raw != 4:
        raise CheckpointError(f"{where}: {str(raw)[:40]} bits are not supported, 4 are")


def _nibbles(words: Tensor) -> Tensor:
    """int32 [..., W] to uint8 [..., 8 W], lowest nibble of a word first."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def _pairs(codes: Tensor) -> Tensor:
    """uint8 codes [N, K], K even, to canonical bytes [N, K/2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _int4(codes: Tensor, scales: Tensor, zeros: Tensor, shape: tuple[int, int], group: int) -> Int4Weight:
    symmetric = bool((zeros == 8).all())
    try:
        return Int4Weight(
            codes.contiguous(), scales.contiguous(), None if symmetric else zeros.contiguous(), shape, group
        )
    except ValueError as wrong:
        raise CheckpointError(str(wrong)) from None


def _import_gptq(quantization: dict[str, Any], parts: _Parts) -> dict[str, Weight]:
    _require_bits(quantization.get("bits"), "gptq")
    version = quantization.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"gptq: checkpoint_format={str(version)[:40]!r} is not supported; gptq and gptq_v2 are")
    zero_shift = 1 if version == "gptq" else 0
    weights: dict[str, Weight] = {}
    for stem in parts.stems(".qweight"):
        n, k = parts.shape(stem)
        group, groups = _group_size(quantization.get("group_size"), k, "gptq")
        if n % 8 or k % 8:
            raise CheckpointError(
                f"tensor {stem!r}: {n} x {k} is not a multiple of 8 in both directions, which GPTQ's words need"
            )
        words = parts.take(stem + ".qweight", (torch.int32,), (k // 8, n))
        zeros = _nibbles(parts.take(stem + ".qzeros", (torch.int32,), (groups, n // 8))) + zero_shift
        scales = parts.take(stem + ".scales", _SCALE_DTYPES, (groups, n))
        parts.drop_sequential_index(stem + ".g_idx", k, group)
        # a word's bytes are already canonical pairs; only rows and columns change places
        codes = words.contiguous().view(torch.uint8).view(k // 8, n, 4).permute(1, 0, 2).reshape(n, k // 2)
        weights[stem + ".weight"] = _int4(codes, scales.T, zeros.T, (n, k), group)
    if quantization.get("desc_act") and not weights:
        raise CheckpointError("gptq: desc_act is set and no quantized tensor is there")
    return weights


def _import_awq(quantization: dict[str, Any], parts: _Parts) -> dict[str, Weight]:
    _require_bits(quantization.get("bits", quantization.get("w_bit")), "awq")
    version = str(quantization.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(f"awq: version={version[:40]!r} is not supported; save the model with version 'gemm'")
    stated = quantization.get("group_size", quantization.get("q_group_size"))
    columns = torch.empty(8, dtype=torch.int64)
    columns[list(_AWQ_COLUMNS)] = torch.arange(8)

    def unpack(words: Tensor) -> Tensor:
        rows = words.shape[0]
        return _nibbles(words).view(rows, -1, 8)[..., columns].reshape(rows, -1).T

    weights: dict[str, Weight] = {}
    for stem in parts.stems(".qweight"):
        n, k = parts.shape(stem)
        group, groups = _group_size(stated, k, "awq")
        if n % 8 or k % 2:
            raise CheckpointError(f"tensor {stem!r}: {n} rows are not a multiple of 8, which AWQ's words need")
        words = parts.take(stem + ".qweight", (torch.int32,), (k, n // 8))
        zeros = parts.take(stem + ".qzeros", (torch.int32,), (groups, n // 8))
        scales = parts.take(stem + ".scales", _SCALE_DTYPES, (groups, n))
        weights[stem + ".weight"] = _int4(_pairs(unpack(words)), scales.T, unpack(zeros), (n, k), group)
    return weights


def _compressed_scheme(quantization: dict[str, Any]) -> dict[str, Any]:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise CheckpointError("compressed-tensors: config_groups must hold exactly one group of weights")
    group = next(iter(groups.values()))
    scheme = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(scheme, dict):
        raise CheckpointError("compressed-tensors: the config group has no 'weights' scheme")
    _require_bits(scheme.get("num_bits"), "compressed-tensors")
    if scheme.get("type", "int") != "int" or scheme.get("strategy") not in ("group", "channel"):
        raise CheckpointError(
            f"compressed-tensors: type {str(scheme.get('type'))[:40]!r} with strategy "
            f"{str(scheme.get('strategy'))[:40]!r} is not "
            "supported; int with strategy group or channel is"
        )
    return scheme


def _import_compressed(quantization: dict[str, Any], parts: _Parts, notes: list[str]) -> dict[str, Weight]:
    scheme = _compressed_scheme(quantization)
    if any(g.get("input_activations") for g in quantization["config_groups"].values()):
        notes.append(
            "compressed-tensors: the stated activation quantization is not applied; choose one when running the model"
        )
    stated = scheme.get("group_size") if scheme["strategy"] == "group" else -1
    weights: dict[str, Weight] = {}
    for stem in parts.stems(".weight_packed"):
        n, k = parts.shape(stem)
        group, groups = _group_size(stated, k, "compressed-tensors")
        words = parts.take(stem + ".weight_packed", (torch.int32,), (n, -(-k // 8)))
        scales = parts.take(stem + ".weight_scale", _SCALE_DTYPES, (n, groups))
        shape = parts.take(stem + ".weight_shape", (torch.int64, torch.int32), (2,))
        if shape.tolist() != [n, k]:
            raise CheckpointError(
                f"tensor {stem + '.weight_shape'!r} says {shape.tolist()}, the architecture needs {[n, k]}"
            )
        zeros = torch.full((n, groups), 8, dtype=torch.uint8)
        if stem + ".weight_zero_point" in parts.tensors:
            packed = parts.take(stem + ".weight_zero_point", (torch.int32,), (-(-n // 8), groups))
            zeros = _nibbles(packed.T)[:, :n].T
        elif not scheme.get("symmetric", True):
            raise CheckpointError(f"tensor {stem + '.weight_zero_point'!r} is missing, the scheme is asymmetric")
        parts.drop_sequential_index(stem + ".weight_g_idx", k, group)
        codes = words.contiguous().view(torch.uint8)[:, : -(-k // 2)]
        weights[stem + ".weight"] = _int4(codes, scales, zeros, (n, k), group)
    return weights


def _import_fp8(parts: _Parts, notes: list[str]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for stem in parts.stems(".weight_scale"):
        n, k = parts.shape(stem)
        codes = parts.take(stem + ".weight", (torch.float8_e4m3fn,), (n, k))
        scale = parts.tensors.pop(stem + ".weight_scale")
        if scale.dtype not in _SCALE_DTYPES or tuple(scale.shape) not in ((n, 1), (n,), (1,), ()):
            raise CheckpointError(
                f"tensor {stem + '.weight_scale'!r} is {scale.dtype} {list(scale.shape)}; a float [{n}, 1] is needed"
            )
        for unused in (".input_scale", ".input_scale_ub"):
            parts.tensors.pop(stem + unused, None)
        weights[stem + ".weight"] = codes.to(torch.float32) * scale.to(torch.float32).reshape(-1, 1)
    if weights:
        notes.append(f"{len(weights)} FP8 matrices were dequantized to float32")
    return weights
