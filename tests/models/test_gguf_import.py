# SPDX-License-Identifier: Apache-2.0
"""GGUF import against the gguf package's own reader and dequantizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_models import KINDS, gguf_name, interleave_rows, random_weights, tiny_config, write_gguf

from tilewright.formats.int4 import Int4Weight
from tilewright.formats.int8 import Int8Weight
from tilewright.models import CheckpointError, LanguageModel, RopeScaling, load
from tilewright.models.gguf_file import read_header
from tilewright.models.gguf_import import repack_nibbles


def oracle_weights(path: Path, model: LanguageModel) -> dict[str, np.ndarray]:
    """Every weight as gguf.dequantize gives it, Q and K rows put back by inverting the row-by-row interleave."""
    config = model.config
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    interleaved = tensors and gguf.GGUFReader(path).fields["general.architecture"].contents() == "llama"
    found = {}
    for name in model.weights:
        tensor = tensors[gguf_name(name)]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if interleaved and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            order = interleave_rows(np.arange(values.shape[0]), heads)
            restored = np.empty_like(values)
            restored[order] = values
            values = restored
        found[name] = values
    return found


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32", "Q5_0", "Q5_1"])
def test_every_value_equals_the_gguf_packages(tmp_path, kind):
    config = tiny_config()
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config), KINDS[kind])
    model = load(path)
    for name, values in oracle_weights(path, model).items():
        np.testing.assert_array_equal(model.dense(name).numpy(), values, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "expected"), [("Q4_0", Int4Weight), ("Q4_1", Int4Weight), ("Q8_0", Int8Weight), ("Q5_0", torch.Tensor)]
)
def test_low_bit_types_stay_low_bit_and_others_leave_a_note(tmp_path, kind, expected):
    config = tiny_config()
    model = load(write_gguf(tmp_path / "m.gguf", config, random_weights(config), KINDS[kind]))
    weight = model.weights["model.layers.1.mlp.up_proj.weight"]
    assert isinstance(weight, expected)
    assert bool(model.notes) == (kind == "Q5_0")
    if kind == "Q4_0":
        assert weight.offsets is None
    if kind == "Q4_1":
        assert weight.offsets.dtype == weight.scales.dtype == torch.float16


def test_float_types_keep_their_dtype(tmp_path):
    config = tiny_config()
    for kind, dtype in ((KINDS.F16, torch.float16), (KINDS.BF16, torch.bfloat16), (KINDS.F32, torch.float32)):
        model = load(write_gguf(tmp_path / f"{kind.name}.gguf", config, random_weights(config), kind))
        assert model.weights["model.layers.0.self_attn.q_proj.weight"].dtype == dtype


def test_half_split_rows_are_restored(tmp_path):
    """Float32 carries the values through unchanged, so the import must invert the writer's interleave exactly."""
    config = tiny_config()
    weights = random_weights(config)
    model = load(write_gguf(tmp_path / "m.gguf", config, weights, KINDS.F32, embedding=KINDS.F32))
    assert model.weights.keys() == weights.keys()
    for name, values in weights.items():
        assert torch.equal(model.weights[name], values), name


def test_configuration_is_restored(tmp_path):
    config = tiny_config(rms_norm_eps=1e-6, rope_theta=123456.0)
    assert load(write_gguf(tmp_path / "m.gguf", config, random_weights(config))).config == config


def test_untied_head_and_wide_heads(tmp_path):
    config = tiny_config(tie_word_embeddings=False, head_dim=32)
    model = load(write_gguf(tmp_path / "m.gguf", config, random_weights(config)))
    assert model.config == config
    assert model.output_name == "lm_head.weight"
    assert isinstance(model.weights["lm_head.weight"], Int8Weight)


def test_qwen2_has_biases_and_no_interleave(tmp_path):
    config = tiny_config(model_type="qwen2", qkv_bias=True)
    weights = random_weights(config)
    model = load(write_gguf(tmp_path / "m.gguf", config, weights, KINDS.F32, embedding=KINDS.F32))
    assert model.config == config
    for name, values in weights.items():
        assert torch.equal(model.weights[name], values), name


def test_biases_of_the_llama_architecture_are_reordered_with_their_rows(tmp_path):
    config = tiny_config(qkv_bias=True)
    weights = random_weights(config)
    model = load(write_gguf(tmp_path / "m.gguf", config, weights, KINDS.F32, embedding=KINDS.F32))
    for name in weights:
        assert torch.equal(model.weights[name], weights[name]), name


def test_llama3_rope_factors_give_the_rule_back(tmp_path):
    rule = RopeScaling(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    config = tiny_config(rope_theta=500000.0, rope_scaling=rule, head_dim=64)
    plain = tiny_config(rope_theta=500000.0, head_dim=64).rope_frequencies()
    factors = (plain / config.rope_frequencies()).numpy()
    model = load(write_gguf(tmp_path / "m.gguf", config, random_weights(config), rope_factors=factors))
    assert model.config == config


def test_unknown_rope_factors_are_kept_as_they_are(tmp_path):
    config = tiny_config()
    factors = np.linspace(1, 3, 8, dtype=np.float32)
    model = load(write_gguf(tmp_path / "m.gguf", config, random_weights(config), rope_factors=factors))
    expected = config.rope_frequencies().double() / torch.from_numpy(factors).double()
    # two float32 roundings against the float64 quotient
    torch.testing.assert_close(model.config.rope_frequencies().double(), expected, rtol=2 * 2**-23, atol=0)


def test_header_equals_the_gguf_packages_reader(tmp_path):
    config = tiny_config()
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config), extra={"a.list": [1, 2, 3], "a.flag": True})
    header, reader = read_header(path), gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            got = header.metadata[key]
            assert (got.tolist() if hasattr(got, "tolist") else got) == field.contents(), key
    assert len(header.metadata) == len([k for k in reader.fields if not k.startswith("GGUF.")])
    for tensor in reader.tensors:
        record = header.tensors[tensor.name]
        assert record.offset == tensor.data_offset
        assert record.nbytes == tensor.n_bytes
        assert record.shape == tuple(int(d) for d in reversed(tensor.shape))


def test_repacked_nibbles_hold_all_codes_in_order():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (5, 3, 32), dtype=np.uint8)
    blocks = codes[..., :16] | (codes[..., 16:] << 4)
    packed = repack_nibbles(blocks)
    assert (packed & 15 == codes[..., 0::2]).all()
    assert (packed >> 4 == codes[..., 1::2]).all()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.residual_scale": 0.5}, "residual_scale"),
        ({"qwen3.rope.freq_base": 5e5}, "outside the file's architecture"),
        ({"split.count": 2}, "join them"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"general.type": "adapter"}, "adapter"),
    ],
)
def test_settings_that_would_change_the_model_are_refused(tmp_path, extra, message):
    config = tiny_config()
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config), extra=extra)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_unsupported_architecture_names_the_supported(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="'gpt2' is not supported; supported are llama"):
        load(tmp_path / "m.gguf")


def test_missing_layer_is_named(tmp_path):
    config = tiny_config()
    weights = random_weights(config)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*missing"):
        load(write_gguf(tmp_path / "m.gguf", config, weights))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_named(tmp_path, value):
    config = tiny_config()
    weights = random_weights(config)
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = float(value)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_down\.weight.*NaN or infinite"):
        load(write_gguf(tmp_path / "m.gguf", config, weights, KINDS.F16))
