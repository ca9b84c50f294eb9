# SPDX-License-Identifier: Apache-2.0
"""Steering objects on a small model: transform, inverse, fold, save, the engine."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from steer_models import source, target, tiny_llama
from torch import nn

from tilewright.capture import ActivationMap, tapped
from tilewright.steer import Steering, methods, steer

IDS = torch.tensor([[5, 9, 30, 2, 44, 17]])


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def random_maps(names, width=32, seed=0) -> Steering:
    random = torch.Generator().manual_seed(seed)
    return Steering(
        {
            name: ActivationMap(
                1 + 0.4 * torch.randn(width, generator=random), 0.3 * torch.randn(width, generator=random)
            )
            for name in names
        }
    )


NORMS = [f"model.layers.{i}.{n}" for i in range(3) for n in ("input_layernorm", "post_attention_layernorm")]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_transform_changes_activations_and_leaves_the_model_as_it_was(model):
    plain, maps = logits(model), random_maps(NORMS)
    seen = {}
    with maps.transform(model, 0.5), tapped(model, {NORMS[3]: lambda name, x: seen.update({name: x})}):
        steered = logits(model)
    assert not torch.equal(steered, plain)
    assert torch.equal(logits(model), plain)
    assert f"{NORMS[3]}@output" in seen


def test_strength_zero_gives_the_same_bits(model):
    with random_maps(NORMS).transform(model, 0.0):
        steered = logits(model)
    assert torch.equal(steered, logits(model))


def test_beyond_one_warns(model):
    with pytest.warns(UserWarning, match="strength = 1.5 extrapolates"), random_maps(NORMS).transform(model, 1.5):
        pass


def test_generation_with_a_cache_gives_the_tokens_without(model):
    maps = random_maps(NORMS)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with maps.transform(model):
        with_cache = model.generate(IDS, **options)
        without = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(with_cache, without)


def test_the_prompt_can_be_left_alone(model):
    maps, plain = random_maps(NORMS), logits(model)
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with maps.transform(model, tokens="generated"):
        assert torch.equal(logits(model), plain)
        generated = model.generate(IDS, **options).logits
    # The first new token comes from the prompt alone; later ones are steered.
    unsteered = model.generate(IDS, **options).logits
    assert torch.equal(generated[0], unsteered[0])
    assert not torch.equal(generated[1], unsteered[1])
    with pytest.raises(ValueError, match="tokens='first'"), maps.transform(model, tokens="first"):
        pass


def test_composition_and_inverse(model):
    first, second = random_maps(NORMS[:3]), random_maps(NORMS[2:5], seed=1)
    with first.transform(model), second.transform(model):
        both = logits(model)
    with first.compose(second).transform(model):
        assert torch.allclose(logits(model), both, atol=1e-5)
    with first.compose(first.inverse()).transform(model):
        assert torch.allclose(logits(model), logits(tiny_llama()), atol=1e-4)


def test_support_counts_moved_coordinates():
    one = ActivationMap(torch.tensor([1.0, 1, 2, 1]), torch.tensor([0.0, 3, 0, 0]))
    assert Steering({"a": one, "b": ActivationMap(torch.ones(4), torch.zeros(4))}).support() == 0.25


@pytest.mark.parametrize(
    "names",
    [NORMS, ["model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj", "model.layers.1.input_layernorm"]],
)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_the_folded_model_is_the_hooked_one(model, names, strength):
    maps, folded = random_maps(names), copy.deepcopy(model)
    maps.fold_(folded, strength)
    assert not any(m._forward_hooks for m in folded.modules())
    with maps.transform(model, strength):
        hooked = logits(model)
    assert (logits(folded) - hooked).abs().max() <= 1e-5 * hooked.abs().max()


def test_folding_into_layer_norms():
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    nn.init.normal_(net[1].bias)
    maps, x = random_maps(["1"], 8), torch.randn(5, 4)
    with maps.transform(net):
        hooked = net(x)
    maps.fold_(net)
    assert torch.allclose(net(x), hooked, atol=1e-5)


class OnePlusNorm(nn.Module):
    """A norm whose gain is 1 + weight, as Gemma's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return (1 + self.weight) * x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1", "is a LlamaDecoderLayer, not a float norm or linear"),
        ("model.norm", "model.norm has no bias, and who reads its output is not known"),
        ("model.layers.1.mlp@input", "is an input"),
    ],
)
def test_what_cannot_be_folded_is_refused_and_nothing_changes(model, name, message):
    folded = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        random_maps([NORMS[0], name]).fold_(folded)
    assert torch.equal(logits(folded), logits(model))


def test_a_norm_with_another_gain_is_refused():
    with pytest.raises(ValueError, match="OnePlusNorm does not multiply by its weight"):
        random_maps(["0"], 8).fold_(nn.Sequential(OnePlusNorm()))


def test_files_come_back(tmp_path, model):
    maps = steer(model, "lineas", source=source(), target=target(), steps=2, gamma=0.01)
    maps.save(tmp_path / "m.safetensors")
    back = Steering.load(tmp_path / "m.safetensors")
    assert (back.method, back.settings, back.report) == (maps.method, maps.settings, maps.report)
    assert list(back.maps) == list(maps.maps)
    for name, one in back.maps.items():
        assert torch.equal(one.weight, maps.maps[name].weight)
        assert torch.equal(one.bias, maps.maps[name].bias)


def test_ranges_are_saved(tmp_path, model):
    maps = steer(model, "lin_act", source=source(), target=target(), support="range").at(0.5)
    maps.save(tmp_path / "m.safetensors")
    back = Steering.load(tmp_path / "m.safetensors")
    with maps.transform(model):
        wanted = logits(model)
    with back.transform(model):
        assert torch.equal(logits(model), wanted)


def test_other_and_damaged_files_are_named(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="tw steer fit"):
        Steering.load(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Steering.load(path)
    good = {"a.weight": torch.ones(2), "a.bias": torch.zeros(2)}
    save_file(good, str(path))
    with pytest.raises(ValueError, match="holds no activation maps"):
        Steering.load(path)
    header = {"format": "tilewright-steering", "version": 1, "method": "x", "settings": {}, "report": {}}

    def write(tensors, **changes):
        save_file(tensors, str(path), metadata={"tilewright": json.dumps(header | changes)})

    write(good, strengths={"a": 1.0}, version=9)
    with pytest.raises(ValueError, match="version 9, this tilewright reads 1"):
        Steering.load(path)
    write(good, strengths={})
    with pytest.raises(ValueError, match=r"tensor 'a\.bias' belongs to no map"):
        Steering.load(path)
    write({"a.weight": torch.ones(2)}, strengths={"a": 1.0})
    with pytest.raises(ValueError, match="the map at a is not complete"):
        Steering.load(path)
    write(good | {"a.bias": torch.full((2,), torch.nan)}, strengths={"a": 1.0})
    with pytest.raises(ValueError, match="bias holds NaN"):
        Steering.load(path)


def test_every_method_learns_maps_that_move_a_model(model):
    plain = logits(model)
    assert len(methods()) == 7
    for name in methods():
        options = {"steps": 3} if name == "lineas" else {}
        maps = steer(model, name, source=source(), target=target(9), **options)
        assert list(maps.maps)[:2] == NORMS[:2]
        assert len(maps.maps) == len(NORMS)
        with maps.transform(model):
            assert not torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)


def test_low_precision_models_are_steered_in_their_dtype():
    model = tiny_llama(dtype=torch.bfloat16)
    maps = steer(model, "lineas", source=source(), target=target(), steps=3)
    assert all(one.weight.dtype == torch.float32 for one in maps.maps.values())
    with maps.transform(model):
        assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lin_akt"}, "steering method 'lin_akt' is not known; did you mean lin_act"),
        ({"source": []}, "source: a list with at least one text"),
        ({"target": [[1], []]}, "target: text 1 has no token"),
        ({"source": ["words"]}, "source: texts need a tokenizer"),
        ({"modules": "model.layers.*.nothing"}, "matches no module"),
        ({"layers": [7]}, r"layers=\[7\] match nothing"),
        ({"modules": ["model.norm", "**.norm"]}, "model.norm is named twice"),
        ({"pooling": "median"}, "pooling='median'"),
        ({"stepz": 3}, "lineas has no such option .* its options are: steps, lr"),
        ({"steps": 0}, "steps = 0"),
        ({"gamma": -1.0}, "gamma = -1.0"),
        ({"schedule": "linear"}, "schedule = 'linear'"),
        ({"normalize": "max", "steps": 1}, "normalize='max'"),
    ],
)
def test_bad_arguments_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        steer(model, **({"source": source(3), "target": target(3)} | options))


def test_places_by_word_and_pattern(model):
    options = {"source": source(4), "target": target(4)}
    blocks = steer(model, "diffmean", modules="block", layers=range(1, 3), **options)
    assert list(blocks.maps) == ["model.layers.1", "model.layers.2"]
    some = steer(model, "diffmean", modules=["model.layers.1.mlp", "model.layers.0.self_attn@input"], **options)
    assert list(some.maps) == ["model.layers.0.self_attn@input", "model.layers.1.mlp"]
