# SPDX-License-Identifier: Apache-2.0
"""A converted model's folder: what comes back, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from converted_models import TYPES, tiny_model
from safetensors.torch import load_file, save_file

from tilewright import linearize, models
from tilewright.adapt import apply_lora, merge_lora
from tilewright.linearize.conversion import converted_layers
from tilewright.linearize.liger import LigerConfig, convert_to_liger
from tilewright.models import CheckpointError

PROMPT = torch.tensor([[5, 9, 17, 33, 65, 8, 2, 40]])


@pytest.fixture
def folder(tmp_path):
    return linearize.save(convert_to_liger(tiny_model(), every=2), tmp_path / "m", training={"steps": 3}, source="tiny")


@pytest.mark.parametrize("kind", TYPES)
def test_a_saved_model_comes_back(kind, tmp_path):
    model = convert_to_liger(tiny_model(kind), "gsa", pool=4, window_size=5, softmax_layers=[1])
    loaded = linearize.load(linearize.save(model, tmp_path / "m", training={"note": 1}, source="tiny"))
    assert loaded.linearization == linearize.linearization(model)
    assert loaded.training == {"note": 1}
    assert sorted(converted_layers(loaded.model)) == [0, 2]
    assert type(loaded.model) is type(model)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    with torch.no_grad():
        assert torch.equal(loaded.model(PROMPT).logits, model(PROMPT).logits)
    assert loaded.config.eos_token_ids == (2,)
    assert loaded.config.max_position_embeddings == 512


def test_tied_embeddings_dtype_and_buffers_come_back(tmp_path):
    base = tiny_model(tie_word_embeddings=True)
    for parameter in base.parameters():  # not the rotary frequencies, which stay float32 in a loaded model
        parameter.data = parameter.data.to(torch.bfloat16)
    model = linearize.convert(base, "liger", LigerConfig(gate="random"))
    loaded = linearize.load(linearize.save(model, tmp_path / "m")).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(PROMPT).logits, model(PROMPT).logits)


def test_saving_again_replaces_the_folder_and_nothing_else(folder, tmp_path):
    model = convert_to_liger(tiny_model(), layers=[1])
    linearize.save(model, folder)
    assert linearize.load(folder).linearization.layers == (1,)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        linearize.save(model, tmp_path / "other")


def test_what_is_not_linearized_or_not_merged_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="not linearized"):
        linearize.save(tiny_model(), tmp_path / "m")
    model = apply_lora(convert_to_liger(tiny_model()))
    with pytest.raises(ValueError, match="merge_lora"):
        linearize.save(model, tmp_path / "m")
    linearize.save(merge_lora(model), tmp_path / "m")


def test_it_is_not_mistaken_for_an_ordinary_model(folder):
    assert linearize.is_linearized(folder)
    with pytest.raises(CheckpointError, match=r"linearize\.load"):
        models.load(folder)
    from transformers import AutoModelForCausalLM

    with pytest.raises(Exception, match=r"config\.json|Unrecognized|model_type"):
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def changed(folder, **keys):
    path = folder / "linearized.json"
    header = json.loads(path.read_text())
    for key, value in keys.items():
        if value is None:
            del header[key]
        else:
            header[key] = value
    path.write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"version": 2}, "'version' is 2"),
        ({"format": "other"}, "'format' must be"),
        ({"method": "rwkv"}, "method 'rwkv' is not known"),
        ({"surprise": 1}, "'surprise' is unknown"),
        ({"layers": None}, "'layers' is missing"),
        ({"layers": "all"}, "'layers' is a str"),
        ({"layers": [9]}, "layers holds 9"),
        ({"config": {"windowsize": 3}}, "unknown key 'windowsize'"),
        ({"config": {"variant": "x"}}, "variant='x'"),
        ({"base": {"model_type": "gemma"}}, r"linearized\.json"),
    ],
)
def test_a_changed_header_is_refused(folder, keys, what):
    changed(folder, **keys)
    with pytest.raises(CheckpointError, match=what):
        linearize.load(folder)


def test_damaged_tensors_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    name = "model.layers.0.self_attn.q_proj.weight"
    for change, what in (
        ({name: tensors[name] + 1e-3}, "damaged"),
        ({name: tensors[name][:8].clone()}, "damaged"),
        ({"extra": torch.ones(2)}, "'extra'"),
    ):
        save_file(tensors | change, str(path))
        with pytest.raises(CheckpointError, match=what):
            linearize.load(folder)
    save_file({n: t for n, t in tensors.items() if n != name}, str(path))
    with pytest.raises(CheckpointError, match=name):
        linearize.load(folder)
    with pytest.raises(CheckpointError, match="no such directory"):
        linearize.load(folder / "nothing")
