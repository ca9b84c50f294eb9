# SPDX-License-Identifier: Apache-2.0
"""Converted language models: the teacher inside, decoding, files, training."""

from __future__ import annotations

import pytest
import torch

from tilewright import linearize
from tilewright.data.bytes import ByteWindows
from tilewright.linearize.hedgehog import (
    HedgehogAttention,
    HedgehogConfig,
    HedgehogRecipe,
    convert_to_hedgehog,
    distill,
    distillation_losses,
    feature_attentions,
    softmax_teacher,
    train,
)

SETTINGS = [{}, {"window_size": 6}, {"key_maps": "query_heads", "activation": "exp_dim", "bias": True}]
FIXED = [{"feature_map": "elu"}, {"feature_map": "relu", "window_size": 6}, {"feature_map": "performer"}]


def tiny(kind="llama", **changes):
    """A random model of two layers, four query heads on two key heads of 8."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    config = AutoConfig.for_model(kind, **(sizes | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(count=20, batch=2, seed=0):
    return torch.randint(1, 40, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_teacher_inside_is_the_base_model(kind):
    model = tiny(kind)
    converted = convert_to_hedgehog(model)
    ids = tokens()
    assert not torch.allclose(logits(converted, ids), logits(model, ids), atol=1e-2)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    with softmax_teacher(converted):
        torch.testing.assert_close(logits(converted, ids, use_cache=False), logits(model, ids))
        padded = logits(converted, ids, use_cache=False, attention_mask=mask)
        expected = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(padded[mask.bool()], expected[mask.bool()])


def test_chosen_layers_and_the_model_given():
    model = tiny(num_hidden_layers=4)
    before = logits(model, tokens())
    converted = convert_to_hedgehog(model, layers=[0, -1])
    assert torch.equal(logits(model, tokens()), before)
    found = [isinstance(layer.self_attn, HedgehogAttention) for layer in converted.model.layers]
    assert found == [True, False, False, True]
    assert len(feature_attentions(converted)) == 2
    kept = convert_to_hedgehog(model, softmax_layers=[1], inplace=True)
    assert kept is model
    with pytest.raises(ValueError, match="already linearized"):
        convert_to_hedgehog(model)
    with pytest.raises(ValueError, match="activation"):
        convert_to_hedgehog(tiny(), activation="none")
    with pytest.raises(ValueError, match="unknown key 'windows'"):
        convert_to_hedgehog(tiny(), windows=3)


@pytest.mark.parametrize("settings", SETTINGS + FIXED)
def test_prefill_and_decode_give_the_logits_of_one_pass(settings):
    """Also with left padding, whose rows must be those of the row alone (given their positions)."""
    model = convert_to_hedgehog(tiny(), **settings).double()
    ids = tokens(24)
    whole = logits(model, ids)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    padded = logits(model, ids, **_positions(mask))
    torch.testing.assert_close(padded[1], whole[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(padded[:1, 5:], logits(model, ids[:1, 5:]), rtol=0, atol=1e-9)
    for real, expected in ((torch.ones_like(mask), whole), (mask, padded)):
        cache, pieces = None, []
        for first, last in ((0, 11), (11, 12), (12, 13), (13, 20), (20, 24)):
            options = {
                "attention_mask": real[:, :last],
                "position_ids": _positions(real)["position_ids"][:, first:last],
            }
            with torch.no_grad():
                out = model(ids[:, first:last], past_key_values=cache, use_cache=True, **options)
            cache = out.past_key_values
            pieces.append(out.logits)
        # float64 everywhere but in transformers' rotary angles, which are the same numbers in both
        torch.testing.assert_close(torch.cat(pieces, 1)[real.bool()], expected[real.bool()], rtol=0, atol=1e-9)


def _positions(real):
    return {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp_min(0)}


@pytest.mark.parametrize("settings", SETTINGS[:2])
def test_the_cache_does_not_grow_and_has_the_stated_size(settings):
    model = convert_to_hedgehog(tiny(), **settings)
    sizes = []
    cache = None
    for count in (3, 1, 1, 40, 1):
        with torch.no_grad():
            cache = model(tokens(count, batch=1), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(sum(layer.nbytes for layer in cache.layers))
    assert len(set(sizes)) == 1
    f, dim, window = 8, 8, settings.get("window_size", 0)
    states = 2 * 4 * 4 * (2 * f * dim + 2 * f)  # layers, bytes, heads: S and z
    rings = 2 * window * (2 * 2 * dim * 4 + 1)  # layers, window: keys and values of two heads, and a flag
    assert sizes[0] == states + rings
    assert cache.get_seq_length() == 46


def test_generate_equals_repeated_forward_passes():
    model = convert_to_hedgehog(tiny(), window_size=4)
    ids = tokens(9, batch=1)
    made = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(12):
        ids = torch.cat((ids, logits(model, ids)[:, -1:].argmax(-1)), 1)
    assert torch.equal(made, ids)


@pytest.mark.parametrize("settings", SETTINGS + FIXED)
def test_saved_and_loaded_again_it_is_identical(settings, tmp_path):
    model = convert_to_hedgehog(tiny(), layers=[1], **settings)
    with torch.no_grad():
        for p in feature_attentions(model)["model.layers.1.self_attn.features"].parameters():
            p.normal_()
    linearize.save(model, tmp_path / "m")
    again = linearize.load(tmp_path / "m")
    assert again.linearization.config == HedgehogConfig.from_dict({"window_size": None} | settings)
    assert torch.equal(logits(again.model, tokens()), logits(model, tokens()))


def test_settings_survive_json():
    config, recipe = HedgehogConfig(window_size=8, init=0.5), HedgehogRecipe(kind="mse", steps=0)
    assert HedgehogConfig.from_dict(config.to_dict()) == config
    assert HedgehogRecipe.from_dict(recipe.to_dict()) == recipe
    for make, word in (
        (lambda: HedgehogConfig(window_size=0), "window_size"),
        (lambda: HedgehogConfig(init=-1.0), "init"),
        (lambda: HedgehogConfig(mix_logit=float("nan")), "mix_logit"),
        (lambda: HedgehogConfig(key_maps="all"), "key_maps"),
        (lambda: HedgehogRecipe(kind="l1"), "kind"),
        (lambda: HedgehogRecipe(distill_lr=0), "distill_lr"),
        (lambda: HedgehogConfig.from_dict({"act": 1}), "act"),
    ):
        with pytest.raises(ValueError, match=word):
            make()


def test_recipe_distils_then_tunes():
    model = convert_to_hedgehog(tiny())
    text = tokens(400, batch=1)[0]
    batches = ByteWindows(text, 2, 16)
    held_out = [tokens(16, seed=5)]
    before = distillation_losses(model, held_out)
    report = train(model, batches, HedgehogRecipe(distill_steps=20, steps=3), progress=False)
    assert report["distillation"]["steps"] == 20
    assert report["tuning"]["steps"] == 3
    assert not any("lora" in name for name, _ in model.named_parameters())
    after = distillation_losses(model, held_out)
    assert all(bool(after[name].mean() < before[name].mean()) for name in before)


def test_an_interrupted_recipe_goes_on_behind_the_distillation(tmp_path, monkeypatch):
    from tilewright.linearize.hedgehog import method

    base, batches = tiny(), ByteWindows(tokens(400, batch=1)[0], 2, 16)
    recipe = HedgehogRecipe(distill_steps=5, steps=3)
    whole = convert_to_hedgehog(base)
    train(whole, batches, recipe, progress=False)

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    model = convert_to_hedgehog(base)
    with monkeypatch.context() as patch:
        patch.setattr(method, "finetune_lora", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(model, batches, recipe, directory=tmp_path, progress=False)
    model = convert_to_hedgehog(base)
    with monkeypatch.context() as patch:
        patch.setattr(method, "distill", interrupted)  # not needed any more
        report = train(model, batches, recipe, directory=tmp_path, progress=False)
        other = HedgehogRecipe(distill_steps=6, steps=3)
        with pytest.raises(KeyboardInterrupt):  # other settings: not the maps that were kept
            train(convert_to_hedgehog(base), batches, other, directory=tmp_path, progress=False)
    assert report["distillation"]["steps"] == 5
    assert torch.equal(logits(model, tokens()), logits(whole, tokens()))


def test_teacher_refuses_a_cache():
    model = convert_to_hedgehog(tiny())
    with softmax_teacher(model), pytest.raises(ValueError, match="no state"):
        model(tokens(), use_cache=True)


def test_layer_from_a_configuration():
    config = tiny().config
    layer = HedgehogAttention(config, 1, window_size=3)
    assert layer.layer_idx == 1
    assert layer.hedgehog.window_size == 3
    angles = torch.zeros(1, 5, 8)
    out, weights = layer(torch.randn(2, 5, 32), (angles.cos(), angles.sin()))
    assert out.shape == (2, 5, 32)
    assert weights is None


@pytest.mark.model
def test_the_real_models_layers_learn(smollm2_gguf):
    """Two layers of SmolLM2, 20 steps of 128 tokens: held-out KL falls (measured: to a half and to a third)."""
    from tilewright import evaluate, models

    base = models.load(smollm2_gguf)
    model = convert_to_hedgehog(models.to_transformers(base, dequantize=True), layers=[1, 2], inplace=True)
    del model.model.layers[3:]  # the rest is not needed for the activations of the first layers
    calibration, evaluation = (
        evaluate.token_batches(evaluate.text_corpus(base.tokenizer, "speeches", part, max_tokens=128 * n), length=128)
        for part, n in (("calibration", 20), ("evaluation", 4))
    )
    before = distillation_losses(model, evaluation)
    distill(model, calibration, steps=20, progress=False)
    after = distillation_losses(model, evaluation)
    assert all(bool(after[name].mean() < 0.8 * before[name].mean()) for name in before)
