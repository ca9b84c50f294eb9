# SPDX-License-Identifier: Apache-2.0
"""load() on transformers directories: shards, tied heads, dtypes, and everything that may be missing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import KINDS, random_weights, tiny_config, write_gguf, write_transformers

from tilewright.models import CheckpointError, load


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_directories_keep_every_bit(tmp_path, shards, dtype):
    config = tiny_config()
    weights = {name: w.to(dtype) for name, w in random_weights(config).items()}
    model = load(write_transformers(tmp_path, config, weights, shards=shards))
    assert model.config == config
    assert model.weights.keys() == weights.keys()
    for name, value in weights.items():
        assert model.weights[name].dtype == dtype
        assert torch.equal(model.weights[name], value)
    assert model.nbytes == sum(w.numel() * w.element_size() for w in weights.values())


def test_a_safetensors_file_with_its_configuration_beside(tmp_path):
    config = tiny_config()
    write_transformers(tmp_path, config, random_weights(config))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert load(tmp_path / "other.safetensors").config == config


def test_all_end_tokens_come_from_the_generation_config(tmp_path):
    config = tiny_config()
    write_transformers(tmp_path, config, random_weights(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load(tmp_path).config.eos_token_ids == (2, 7)


def test_a_repeated_tied_head_is_dropped_and_a_different_one_refused(tmp_path):
    config = tiny_config()
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    assert "lm_head.weight" not in load(write_transformers(tmp_path / "same", config, weights)).weights
    weights["lm_head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match="ties the output head"):
        load(write_transformers(tmp_path / "other", config, weights))


def test_old_rotary_buffers_are_ignored(tmp_path):
    config = tiny_config()
    weights = random_weights(config)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert load(write_transformers(tmp_path, config, weights | extra)).weights.keys() == weights.keys()


def test_stated_dtype_that_differs_leaves_a_note(tmp_path):
    config = tiny_config()
    model = load(write_transformers(tmp_path, config, random_weights(config), changes={"dtype": "bfloat16"}))
    assert any("bfloat16" in note for note in model.notes)


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "integer", "nan"])
def test_faulty_tensors_are_named(tmp_path, fault):
    config = tiny_config()
    weights = random_weights(config)
    name = "model.layers.1.self_attn.v_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "unknown":
        name = "model.layers.2.self_attn.v_proj.weight"
        weights[name] = torch.zeros(32, 64)
    elif fault == "shape":
        weights[name] = torch.zeros(64, 32)
    elif fault == "integer":
        weights[name] = torch.zeros(32, 64, dtype=torch.int64)
    else:
        weights[name][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(write_transformers(tmp_path, config, weights))


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "", "..", 7, None, ["a"]])
def test_an_index_may_only_name_files_beside_it(tmp_path, target):
    config = tiny_config()
    write_transformers(tmp_path, config, random_weights(config), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = target
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="same directory"):
        load(tmp_path)


def test_index_and_shard_must_agree(tmp_path):
    config = tiny_config()
    write_transformers(tmp_path, config, random_weights(config), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    del raw["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*in the file only"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "JSON object is needed"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100000, "nested too deeply"),
        (b'{"model_type": "llama", "model_type": "llama"}', "given twice"),
        (b'{"model_type": {"a": 1}}', "not supported"),
    ],
)
def test_damaged_config_json_is_described(tmp_path, content, message):
    config = tiny_config()
    write_transformers(tmp_path, config, random_weights(config))
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_places_without_a_model_are_described(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="neither a GGUF nor a safetensors"):
        load(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_transformers()))
    with pytest.raises(CheckpointError, match="holds no model"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="can run code"):
        load(tmp_path)
    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, random_weights(config), KINDS.Q4_0)
    with pytest.raises(CheckpointError, match=r"name one of them: m\.gguf"):
        load(tmp_path)


def test_gguf_is_recognised_without_its_suffix(tmp_path):
    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, random_weights(config)).rename(tmp_path / "blob")
    assert load(tmp_path / "blob").config == config


def test_a_missing_shard_is_named(tmp_path):
    config = tiny_config()
    write_transformers(tmp_path, config, random_weights(config), shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        load(tmp_path)


def test_float64_is_rounded_with_a_note(tmp_path):
    config = tiny_config()
    weights = {n: w.double() for n, w in random_weights(config).items()}
    write_transformers(tmp_path, config, {})
    save_file(weights, str(tmp_path / "model.safetensors"))
    model = load(tmp_path)
    assert model.notes
    assert {w.dtype for w in model.weights.values()} == {torch.float32}


def test_importing_the_package_brings_in_no_other_framework():
    code = (
        "import sys; from tilewright.models import LlamaConfig, load, save; "
        "print([m for m in ('transformers', 'gguf', 'safetensors', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
