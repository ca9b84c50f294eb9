# SPDX-License-Identifier: Apache-2.0
"""GPTQ, AWQ, compressed-tensors and FP8 checkpoints, packed here word by word from known integers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_weights, tiny_config, write_transformers

from tilewright.formats import Int4Weight
from tilewright.models import CheckpointError, load
from tilewright.models.language_model import linear_names

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(codes: list[int]) -> int:
    """Eight 4-bit numbers to one int32, the first in the lowest bits."""
    value = sum(c << (4 * i) for i, c in enumerate(codes))
    return value - (1 << 32) if value >= 1 << 31 else value


def pack_rows(codes: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
    """[R, 8 W] codes to int32 [R, W]; nibble p of a word holds column order[p]."""
    order = order or list(range(8))
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    rows = [[words([row[8 * w + o] for o in order]) for w in range(len(row) // 8)] for row in codes.tolist()]
    return torch.tensor(rows, dtype=torch.int32)


class Quantized:
    """Random codes, zero points and scales for every linear of a model, and the float64 values they stand for."""

    def __init__(self, config, group: int, *, symmetric: bool, dtype=torch.float16):
        generator = torch.Generator().manual_seed(1)
        self.config, self.group = config, group
        self.rest = random_weights(config)
        self.parts, self.values = {}, {}
        for name in linear_names(config):
            n, k = self.rest.pop(name).shape
            size = k if group == -1 else group
            groups = -(-k // size)
            codes = torch.randint(0, 16, (n, k), generator=generator)
            zeros = torch.full((n, groups), 8) if symmetric else torch.randint(1, 16, (n, groups), generator=generator)
            scales = (torch.rand(n, groups, generator=generator) * 0.05 + 0.01).to(dtype)
            self.parts[name.removesuffix(".weight")] = (codes, zeros, scales)
            index = torch.arange(k) // size
            self.values[name] = (codes - zeros[:, index]).double() * scales.double()[:, index]

    def check(self, model) -> None:
        for name, values in self.values.items():
            weight = model.weights[name]
            assert isinstance(weight, Int4Weight)
            assert torch.equal(weight.dequantize(torch.float64), values), name
            assert torch.equal(weight.scales, self.parts[name.removesuffix(".weight")][2])
        for name, values in self.rest.items():
            assert torch.equal(model.weights[name], values)

    def gptq(self, version: int) -> dict[str, torch.Tensor]:
        tensors = dict(self.rest)
        for stem, (codes, zeros, scales) in self.parts.items():
            tensors[stem + ".qweight"] = pack_rows(codes).T.contiguous()
            tensors[stem + ".qzeros"] = pack_rows((zeros - int(version == 1)).T.contiguous())
            tensors[stem + ".scales"] = scales.T.contiguous()
            k = codes.shape[1]
            tensors[stem + ".g_idx"] = (torch.arange(k) // (k if self.group == -1 else self.group)).to(torch.int32)
        return tensors

    def awq(self) -> dict[str, torch.Tensor]:
        tensors = dict(self.rest)
        for stem, (codes, zeros, scales) in self.parts.items():
            tensors[stem + ".qweight"] = pack_rows(codes.T.contiguous(), AWQ_ORDER)
            tensors[stem + ".qzeros"] = pack_rows(zeros.T.contiguous(), AWQ_ORDER)
            tensors[stem + ".scales"] = scales.T.contiguous()
        return tensors

    def compressed(self, *, zeros: bool) -> dict[str, torch.Tensor]:
        tensors = dict(self.rest)
        for stem, (codes, zero, scales) in self.parts.items():
            tensors[stem + ".weight_packed"] = pack_rows(codes)
            tensors[stem + ".weight_scale"] = scales
            tensors[stem + ".weight_shape"] = torch.tensor(codes.shape)
            if zeros:
                tensors[stem + ".weight_zero_point"] = pack_rows(zero.T.contiguous()).T.contiguous()
        return tensors


def gptq_config(group: int, version: int = 1, **changes):
    form = "gptq" if version == 1 else "gptq_v2"
    raw = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "checkpoint_format": form}
    return {"quantization_config": raw | changes}


def compressed_config(group: int, *, symmetric: bool, **changes):
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    scheme = {"num_bits": 4, "type": "int", "symmetric": symmetric} | strategy | changes
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}}
    raw = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return {"quantization_config": raw}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 64, 128, -1])
def test_gptq_is_exact(tmp_path, version, symmetric, group):
    made = Quantized(tiny_config(), group, symmetric=symmetric)
    model = load(write_transformers(tmp_path, made.config, made.gptq(version), changes=gptq_config(group, version)))
    made.check(model)
    assert model.weights["model.layers.0.mlp.up_proj.weight"].symmetric == symmetric


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_awq_is_exact(tmp_path, symmetric, group):
    made = Quantized(tiny_config(), group, symmetric=symmetric)
    raw = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    made.check(load(write_transformers(tmp_path, made.config, made.awq(), changes={"quantization_config": raw})))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_compressed_tensors_is_exact(tmp_path, symmetric, group, dtype):
    made = Quantized(tiny_config(), group, symmetric=symmetric, dtype=dtype)
    changes = compressed_config(group, symmetric=symmetric)
    made.check(load(write_transformers(tmp_path, made.config, made.compressed(zeros=not symmetric), changes=changes)))


def test_compressed_tensors_with_ragged_sizes(tmp_path):
    config = tiny_config(hidden_size=68, intermediate_size=102, head_dim=18)
    made = Quantized(config, 32, symmetric=False)
    changes = compressed_config(32, symmetric=False)
    made.check(load(write_transformers(tmp_path, config, made.compressed(zeros=True), changes=changes)))


def test_fp8_weights_become_float32_with_a_note(tmp_path):
    config = tiny_config()
    tensors, values = random_weights(config), {}
    for name in linear_names(config):
        scale = torch.rand(tensors[name].shape[0], 1) * 0.01 + 0.001
        tensors[name] = (tensors[name] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale")] = scale
        values[name] = tensors[name].float() * scale
    changes = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    model = load(write_transformers(tmp_path, config, tensors, changes=changes))
    assert any("FP8" in note for note in model.notes)
    for name, value in values.items():
        assert torch.equal(model.weights[name], value)


def test_act_order_is_refused_with_the_way_out(tmp_path):
    made = Quantized(tiny_config(), 32, symmetric=True)
    tensors = made.gptq(1)
    name = "model.layers.0.self_attn.q_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    with pytest.raises(CheckpointError, match="desc_act=False"):
        load(write_transformers(tmp_path, made.config, tensors, changes=gptq_config(32, desc_act=True)))


def test_a_bias_of_zeros_that_the_architecture_lacks_is_dropped(tmp_path):
    made = Quantized(tiny_config(), 32, symmetric=True)
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors = made.gptq(1) | {name: torch.zeros(64, dtype=torch.float16)}
    made.check(load(write_transformers(tmp_path / "zero", made.config, tensors, changes=gptq_config(32))))
    tensors[name] = torch.ones(64, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"q_proj\.bias.*does not belong"):
        load(write_transformers(tmp_path / "one", made.config, tensors, changes=gptq_config(32)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (gptq_config(32, bits=8), "8 bits"),
        (gptq_config(20), "group_size=20"),
        (gptq_config(64), "qzeros"),
        (gptq_config(32, checkpoint_format="marlin"), "'marlin'"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "'bitsandbytes' is not supported; supported are gptq",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}, "qweight"),
        ({"quantization_config": [1]}, "must be an object"),
        (compressed_config(32, symmetric=True), "no tensor of that kind"),
        (compressed_config(32, symmetric=True, num_bits=8), "8 bits"),
        (compressed_config(32, symmetric=True, strategy="tensor_group"), "tensor_group"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, message):
    made = Quantized(tiny_config(), 32, symmetric=True)
    with pytest.raises(CheckpointError, match=message):
        load(write_transformers(tmp_path, made.config, made.gptq(1), changes=changes))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_missing_and_mistyped_parts_are_named(tmp_path, part):
    made = Quantized(tiny_config(), 32, symmetric=True)
    name = f"model.layers.1.mlp.down_proj.{part}"
    tensors = made.gptq(1)
    wrong = tensors | {name: tensors[name].to(torch.float64)}
    with pytest.raises(CheckpointError, match=part):
        load(write_transformers(tmp_path / "a", made.config, wrong, changes=gptq_config(32)))
    del tensors[name]
    with pytest.raises(CheckpointError, match=r"down_proj"):
        load(write_transformers(tmp_path / "b", made.config, tensors, changes=gptq_config(32)))


def test_non_finite_scale_is_named(tmp_path):
    made = Quantized(tiny_config(), 32, symmetric=True)
    tensors = made.gptq(1)
    tensors["model.layers.1.mlp.down_proj.scales"][0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=r"down_proj.*NaN or infinite"):
        load(write_transformers(tmp_path, made.config, tensors, changes=gptq_config(32)))
