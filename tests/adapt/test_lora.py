# SPDX-License-Identifier: Apache-2.0
"""LoRA: the function, what is trained, merging, files in peft's form."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tilewright.adapt import LoraConfig, LoraLinear, apply_lora, load_lora, lora_parameters, merge_lora, save_lora
from tilewright.adapt.lora import lora_config, lora_state


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 8, dtype=dtype)
        self.o_proj = nn.Linear(8, 6, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)

    def forward(self, x):
        return self.norm(self.o_proj(self.q_proj(x).tanh()))


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Block(dtype), Block(dtype))


def adapted(dtype: torch.dtype = torch.float32, **options) -> nn.Sequential:
    made = apply_lora(model(dtype), ["q_proj"], r=3, alpha=6, **options)
    with torch.no_grad():
        for parameter in lora_parameters(made):
            parameter.copy_(torch.randn_like(parameter))
    return made


def test_it_starts_as_the_base_and_only_adapters_are_trainable():
    base, x = model(), torch.randn(4, 6)
    made = apply_lora(model(), ["q_proj", "o_proj"], r=2)
    assert torch.equal(made(x), base(x))
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in made.named_parameters() if "lora_" in name}
    assert sum(p.numel() for p in lora_parameters(made)) == 2 * 2 * (6 + 8 + 8 + 6)
    made(x).square().sum().backward()
    assert all(p.grad is None for name, p in made.named_parameters() if "lora_" not in name)


def test_the_update_is_alpha_over_r_times_b_a():
    made, x = adapted(torch.float64), torch.randn(5, 6, dtype=torch.float64)
    layer = made[0].q_proj
    weight = layer.base_layer.weight + 6 / 3 * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer(x), x @ weight.T + layer.base_layer.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_keeps_the_function_and_leaves_plain_layers(dtype):
    made, x = adapted(dtype), torch.randn(5, 6, dtype=dtype)
    with torch.no_grad():
        before = made(x)
        after = merge_lora(made)(x)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert not any(isinstance(m, LoraLinear) for m in made.modules())
    assert made.state_dict().keys() == model().state_dict().keys()
    assert lora_config(made) is None
    with pytest.raises(ValueError, match="no adapter"):
        merge_lora(made)


def test_bfloat16_base_has_float32_adapters():
    made = adapted(torch.bfloat16)
    assert {p.dtype for p in lora_parameters(made)} == {torch.float32}
    assert made(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dropout_acts_in_training_only():
    made, x = adapted(dropout=0.5), torch.randn(64, 6)
    assert not torch.equal(made.train()(x), made(x))
    assert torch.equal(made.eval()(x), made(x))


def test_files_have_the_names_of_peft(tmp_path):
    made, x = adapted(), torch.randn(4, 6)
    save_lora(made, tmp_path / "a")
    tensors = load_file(str(tmp_path / "a" / "adapter_model.safetensors"))
    assert "base_model.model.0.q_proj.lora_A.weight" in tensors
    assert tensors["base_model.model.1.q_proj.lora_B.weight"].shape == (8, 3)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert {k: fields[k] for k in ("peft_type", "r", "lora_alpha", "target_modules", "bias")} == {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6.0,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    loaded = load_lora(model(), tmp_path / "a")
    assert torch.equal(loaded(x), made(x))
    assert lora_config(loaded) == LoraConfig(3, 6.0, 0.0, ("q_proj",))


def test_adapters_of_some_layers_only(tmp_path):
    made = apply_lora(model(), ["q_proj"], within=["1"])
    assert list(lora_state(made)) == [f"base_model.model.1.q_proj.lora_{x}.weight" for x in "AB"]
    save_lora(made, tmp_path / "a")
    assert lora_state(load_lora(model(), tmp_path / "a")).keys() == lora_state(made).keys()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = all"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ],
)
def test_another_kind_of_adapter_is_refused(tmp_path, change, what):
    save_lora(adapted(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=what):
        load_lora(model(), tmp_path / "a")


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    save_lora(adapted(), tmp_path / "a")
    path = str(tmp_path / "a" / "adapter_model.safetensors")
    tensors = load_file(path)
    name = "base_model.model.0.q_proj.lora_A.weight"
    save_file(tensors | {name: torch.zeros(4, 6)}, path)
    with pytest.raises(ValueError, match=r"shape \[4, 6\], needed \[3, 6\]"):
        load_lora(model(), tmp_path / "a")
    save_file(tensors | {"base_model.model.0.q_proj.lora_magnitude_vector": torch.zeros(4)}, path)
    with pytest.raises(ValueError, match="lora_magnitude_vector"):
        load_lora(model(), tmp_path / "a")
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="is missing"):
        load_lora(model(), tmp_path / "a")
    (tmp_path / "a" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="notes"):
        save_lora(adapted(), tmp_path / "a")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="'v_proj'"):
        apply_lora(model(), ["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="LayerNorm"):
        apply_lora(model(), ["norm"])
    with pytest.raises(ValueError, match="already has an adapter"):
        apply_lora(adapted(), ["q_proj"])
    with pytest.raises(ValueError, match="r = 0"):
        LoraConfig(r=0)
    with pytest.raises(ValueError, match=r"lora_dropout = 1\.0"):
        LoraConfig(lora_dropout=1.0)
    with pytest.raises(ValueError, match="target_modules"):
        LoraConfig(target_modules=())
    with pytest.raises(ValueError, match="no adapter to save"):
        save_lora(model(), "nowhere")
