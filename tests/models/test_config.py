# SPDX-License-Identifier: Apache-2.0
"""LlamaConfig: round trips, agreement with transformers, refusal of what is not supported."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_config

from tilewright.models import CheckpointError, LlamaConfig, RopeScaling

SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", factor=4.0),
    "llama3": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=32),
    "yarn": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.2),
    "factors": RopeScaling("factors", factors=tuple(1.0 + i / 4 for i in range(8))),
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_dictionary_round_trip_through_json(kind, model_type):
    window = 64 if model_type != "llama" else None
    config = tiny_config(model_type=model_type, rope_scaling=SCALINGS[kind], sliding_window=window)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("kind", SCALINGS)
def test_transformers_round_trip(kind):
    config = tiny_config(rope_scaling=SCALINGS[kind], eos_token_ids=(2, 5), qkv_bias=True, output_bias=True)
    assert LlamaConfig.from_transformers(json.loads(json.dumps(config.to_transformers()))) == config


@pytest.mark.parametrize("kind", ["none", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_frequencies_equal_transformers_bit_for_bit(kind, theta):
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = tiny_config(rope_scaling=SCALINGS[kind], rope_theta=theta, head_dim=64)
    theirs = LlamaRotaryEmbedding(TheirConfig(**config.to_transformers()))
    assert torch.equal(config.rope_frequencies(), theirs.inv_freq)
    assert config.rotation_gain == theirs.attention_scaling


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_transformers_reads_the_same_architecture(model_type):
    from transformers import AutoConfig

    config = tiny_config(model_type=model_type, qkv_bias=model_type == "qwen2")
    theirs = AutoConfig.for_model(**config.to_transformers())
    assert LlamaConfig.from_transformers(theirs.to_dict()) == config


def test_older_rope_scaling_key_is_read():
    raw = tiny_config().to_transformers()
    del raw["rope_parameters"]
    raw |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config = LlamaConfig.from_transformers(raw)
    assert (config.rope_theta, config.rope_scaling) == (5000.0, RopeScaling("linear", factor=2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt_neox"},
            "'gpt_neox' is not supported; supported are the Llama family: llama, mistral, qwen2",
        ),
        ({"model_type": None}, "not supported"),
        ({"hidden_size": "64"}, "hidden_size=64 must be a whole number"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"eos_token_id": 4096}, "eos_token_ids=4096"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types mixes"),
        ({"rope_thetb": 1.0, "rope_parameters": None}, "did you mean 'rope_theta'"),
    ],
)
def test_unsupported_or_wrong_values_are_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_transformers(tiny_config().to_transformers() | changes)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_strict_dictionary_names_the_key(change):
    raw = tiny_config().to_dict()
    if change == "missing":
        del raw["rope_theta"]
    else:
        raw["rope_thetb"] = 1.0
    with pytest.raises(CheckpointError, match="rope_thet"):
        LlamaConfig.from_dict(raw)


def test_missing_key_of_config_json_is_named():
    for key in ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "rms_norm_eps"):
        raw = tiny_config().to_transformers()
        del raw[key]
        with pytest.raises(CheckpointError, match=key):
            LlamaConfig.from_transformers(raw)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": False}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 64),
        ({"use_sliding_window": True, "max_window_layers": 2}, None),
    ],
)
def test_qwen2_window_follows_its_flag(changes, window):
    raw = tiny_config(model_type="qwen2").to_transformers() | {"sliding_window": 64} | changes
    assert LlamaConfig.from_transformers(raw).sliding_window == window


def test_qwen2_with_mixed_windows_is_refused():
    raw = tiny_config(model_type="qwen2").to_transformers()
    raw |= {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}
    with pytest.raises(CheckpointError, match="max_window_layers=1 of 2"):
        LlamaConfig.from_transformers(raw)
