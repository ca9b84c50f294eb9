# SPDX-License-Identifier: Apache-2.0
"""FireQ and round-to-nearest on whole models: what changes, what must not, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_config, small_model, tokens

from tilewright import quantize
from tilewright.formats import Int4Weight, quantize_int4
from tilewright.models import linear_names, load, save, to_transformers
from tilewright.quantize.fireq import LLAMA3_8B_RECIPE, ChannelScaling, FireQConfig, quantize_model
from tilewright.quantize.fireq.channels import channel_factors, scale_channels
from tilewright.quantize.fireq.method import round_weight
from tilewright.quantize.fireq.per_tensor import repo_per_tensor_scale
from tilewright.quantize.fireq.rope import calibrate_keys, key_scales
from tilewright.quantize.fireq.search import SiteError, activation_factors, best_factors
from tilewright.quantize.rtn import RTNConfig
from tilewright.quantize.rtn import quantize_model as round_model
from tilewright.reference.low_bit import dequantize_symmetric, quantize_symmetric

KEY_SCALE = "model.layers.{}.self_attn.key_scale"
PLAIN = {"channel_scaling": (), "pre_rope": False, "post_rope_top_k": 0, "group_size": 16}


def low_bit_model(**changes):
    """A model whose linears already are INT4 with a minimum per group, like a Q4_1 file."""
    model = small_model(**changes)
    for name in linear_names(model.config):
        model.weights[name] = quantize_int4(model.dense(name), 32, torch.float16, symmetric=False)
    return model


def same(a, b):
    if isinstance(a, Int4Weight):
        return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and a.shape == b.shape
    return torch.equal(a, b)


def test_methods_are_found_by_their_folders():
    assert sorted(quantize.methods()) == ["crossquant", "fireq", "rtn"]
    assert quantize.method("fireq").quantize_model is quantize_model
    with pytest.raises(ValueError, match="did you mean fireq"):
        quantize.method("firq")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_scaling_fireq_is_round_to_nearest(dtype):
    model = small_model()
    ours = quantize_model(model, FireQConfig(**PLAIN, scale_dtype=dtype))
    baseline = round_model(model, RTNConfig(group_size=16, scale_dtype=dtype))
    assert ours.weights.keys() == baseline.weights.keys() == model.weights.keys()
    assert all(same(ours.weights[name], baseline.weights[name]) for name in ours.weights)


def test_round_to_nearest_is_the_reference_grid():
    model = small_model()
    got = round_model(model, RTNConfig(group_size=32, scale_dtype="float16"))
    for name in linear_names(model.config):
        q, s = quantize_symmetric(model.weights[name].double(), 32, scale_dtype=torch.float16)
        weight = got.weights[name]
        codes = weight.unpacked_codes().double() - 8
        # float32 against float64 division: codes on a tie may differ by one, nothing else may.
        assert float((codes - q).abs().max()) <= 1
        assert float((codes != q).double().mean()) < 1e-3
        torch.testing.assert_close(weight.dequantize(torch.float64), dequantize_symmetric(codes, s, 32))


def test_every_linear_and_nothing_else_becomes_int4():
    model = small_model(qkv_bias=True, output_bias=True, tie_word_embeddings=False)
    before = {name: w.clone() for name, w in model.weights.items()}
    got = quantize_model(model, FireQConfig(group_size=16), [tokens()])
    low_bit = {name for name, w in got.weights.items() if isinstance(w, Int4Weight)}
    assert low_bit == set(linear_names(model.config))
    assert {n for n in got.weights if n not in model.weights} == {KEY_SCALE.format(i) for i in range(2)}
    assert all(torch.equal(model.weights[name], before[name]) for name in before)
    untouched = (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
    )
    assert all(got.weights[name] is model.weights[name] for name in untouched)


def test_weights_are_those_of_the_scaled_model():
    model = small_model(qkv_bias=True, output_bias=True)
    scaling = (ChannelScaling("mlp_input"), ChannelScaling("attention_output", "max"), ChannelScaling("mlp_output"))
    config = FireQConfig(group_size=16, channel_scaling=scaling, v_mul=0.9, post_rope_top_k=2)
    got = quantize_model(model, config, [tokens()])
    module = to_transformers(model, dequantize=True)
    keys = [key_scales(s, top_k=2) for s in calibrate_keys(module, model.config, [tokens()])]
    weights = dict(model.weights)
    prefix = "model.layers.1."
    for one in scaling:
        scale_channels(weights, prefix, one.site, channel_factors(weights, prefix, one, model.config), model.config)
    attention = prefix + "self_attn."
    weights[attention + "v_proj.weight"] = weights[attention + "v_proj.weight"] * 0.9
    weights[attention + "v_proj.bias"] = weights[attention + "v_proj.bias"] * 0.9
    weights[attention + "o_proj.weight"] = weights[attention + "o_proj.weight"] * (1 / 0.9)
    rows = torch.cat((keys[1].pre, keys[1].pre), 1)
    weights[attention + "k_proj.weight"] = weights[attention + "k_proj.weight"] * rows.reshape(-1, 1)
    weights[attention + "k_proj.bias"] = weights[attention + "k_proj.bias"] * rows.flatten()
    for name, weight in weights.items():
        if not name.startswith(prefix) or "q_proj" in name:
            continue
        expected = quantize_int4(weight, 16) if name in set(linear_names(model.config)) else weight
        assert same(got.weights[name], expected), name
    assert torch.equal(got.weights[KEY_SCALE.format(1)], keys[1].post)


@pytest.mark.parametrize("stat", ["max", "mean"])
def test_a_model_made_hard_by_powers_of_two_is_recovered_exactly(stat):
    easy, hard = small_model(), small_model()
    uneven = torch.ones(48)
    uneven[torch.randperm(48, generator=torch.Generator().manual_seed(1))[:6]] = 16.0
    for layer in range(2):
        scale_channels(hard.weights, f"model.layers.{layer}.", "mlp_input", uneven, hard.config)
    config = FireQConfig(**(PLAIN | {"channel_scaling": (ChannelScaling("mlp_input", stat, 0.5),)}))
    expected, got = quantize_model(easy, config), quantize_model(hard, config)
    assert all(same(expected.weights[name], got.weights[name]) for name in expected.weights)
    plain = FireQConfig(**PLAIN)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not same(quantize_model(easy, plain).weights[name], quantize_model(hard, plain).weights[name])


def test_kept_weights_stay_bit_for_bit():
    model = low_bit_model()
    got = quantize_model(model, FireQConfig(), [tokens()])
    assert all(got.weights[name] is model.weights[name] for name in model.weights)
    module = to_transformers(model, dequantize=True)
    for i, seen in enumerate(calibrate_keys(module, model.config, [tokens()])):
        assert torch.equal(got.weights[KEY_SCALE.format(i)], key_scales(seen).combined)
    assert any("kept, bit for bit" in note for note in got.notes)


def test_low_bit_weights_can_be_rounded_anew():
    model = low_bit_model()
    got = quantize_model(model, FireQConfig(**PLAIN, weights="int4"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert same(got.weights[name], quantize_int4(model.dense(name), 16))


def test_pre_rope_scales_may_ride_on_the_online_scale():
    model = small_model()
    online = quantize_model(
        model, FireQConfig(pre_rope_placement="online", post_rope_top_k=2, group_size=16), [tokens()]
    )
    rows = quantize_model(model, FireQConfig(pre_rope_placement="rows", post_rope_top_k=2, group_size=16), [tokens()])
    name = "model.layers.0.self_attn.k_proj.weight"
    assert same(online.weights[name], quantize_int4(model.weights[name], 16))
    assert not same(rows.weights[name], online.weights[name])


def test_nothing_online_without_post_rope_scaling():
    got = quantize_model(small_model(), FireQConfig(post_rope_top_k=0, group_size=16), [tokens()])
    assert not any("key_scale" in name for name in got.weights)


def test_sixteen_bit_cache_needs_no_calibration_and_no_key_scale():
    got = quantize_model(small_model(), FireQConfig(kv_bits=16, group_size=16))
    assert not any("key_scale" in name for name in got.weights)
    assert any("16 bits" in note for note in got.notes)
    assert got.settings["kv_bits"] == 16


def test_fold_mode_takes_fp8_scales_and_a_power_of_two():
    got = quantize_model(small_model(), FireQConfig(**PLAIN, mode="fold"))
    for name in linear_names(got.config):
        weight = got.weights[name]
        assert weight.scales.dtype == torch.float8_e4m3fn
        largest = float(weight.scales.float().max())
        assert 8 * largest <= 448
        assert largest > 14
        assert weight.per_tensor_scale == 2.0 ** round(torch.tensor(weight.per_tensor_scale).log2().item())


def test_result_survives_saving_with_its_settings(tmp_path):
    got = quantize_model(small_model(), FireQConfig(group_size=16), [tokens(), tokens(seed=6)])
    save(got, tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.weights.keys() == got.weights.keys()
    assert all(same(back.weights[name], got.weights[name]) for name in got.weights)
    assert back.settings == got.settings
    assert FireQConfig.from_dict(back.settings["config"]) == FireQConfig(group_size=16)
    assert back.settings["calibration_batches"] == 2
    with pytest.raises(ValueError, match="already quantized with fireq"):
        quantize_model(back, FireQConfig(), [tokens()])


def test_llama3_recipe_runs():
    got = quantize_model(small_model(), LLAMA3_8B_RECIPE, [tokens()])
    assert got.settings["mode"] == "fold"
    assert FireQConfig.from_dict(json.loads(json.dumps(LLAMA3_8B_RECIPE.to_dict()))) == LLAMA3_8B_RECIPE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FireQConfig(weights="keep", v_mul=0.9), "factor per column"),
        (FireQConfig(weights="keep", search=(0.5,)), "factor per column"),
        (FireQConfig(weights="keep", mode="fold"), "needs FP8 group scales"),
        (FireQConfig(weights="keep", pre_rope_placement="rows"), "would change kept weights"),
        (FireQConfig(channel_scaling=(ChannelScaling("mlp_input"),)), "factor per column"),
        (FireQConfig(post_rope_top_k=9), "a head of this model has 8"),
    ],
)
def test_what_kept_weights_cannot_take_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        quantize_model(low_bit_model(), config, [tokens()])


def test_keeping_needs_something_to_keep():
    for run, config in ((quantize_model, FireQConfig(weights="keep")), (round_model, RTNConfig(weights="keep"))):
        with pytest.raises(ValueError, match="this one has none"):
            run(small_model(), config, [tokens()])


def test_missing_calibration_is_named():
    with pytest.raises(ValueError, match="calibration_batches is missing"):
        quantize_model(small_model(), FireQConfig(group_size=16))
    with pytest.raises(ValueError, match="batches is empty"):
        quantize_model(small_model(), FireQConfig(group_size=16), [])


def test_damaged_weights_are_named():
    model = small_model()
    model.weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinit"):
        quantize_model(model, FireQConfig(**PLAIN))


@pytest.mark.parametrize(
    "raw",
    [
        {"group_size": 20},
        {"group_size": 0},
        {"group_size": True},
        {"mode": "folded"},
        {"mode": "fold", "activations": "int8"},
        {"activations": "fp4"},
        {"alpha": 0.0},
        {"alpha": float("inf")},
        {"beta": "8"},
        {"v_mul": -1},
        {"post_rope_top_k": -1},
        {"pre_rope": 1},
        {"kv_bits": 4.0},
        {"kv_bits": 8},
        {"per_tensor_scale": "best"},
        {"per_tensor_scale": 0},
        {"scale_dtype": "float64"},
        {"channel_scaling": "all"},
        {"channel_scaling": [{"site": "mlp"}]},
        {"channel_scaling": [{"site": "mlp_input", "stat": "rms"}]},
        {"channel_scaling": [{"site": "mlp_input", "const": 0}]},
        {"channel_scaling": [{"site": "mlp_input"}, {"site": "mlp_input"}]},
        {"weights": "keep", "channel_scaling": [{"site": "mlp_input"}]},
        {"channel_scaling": 3},
        {"channel_scaling": ["mlp_input"]},
        {"channel_scaling": [{}]},
        {"search": 0.3},
        {"search": "0.3"},
        {"search": [-0.1]},
        {"search": ["0.3"]},
    ],
)
def test_config_refuses_and_names_the_field(raw):
    with pytest.raises(ValueError) as caught:
        FireQConfig.from_dict(raw)
    assert any(key in str(caught.value) for key in (*raw, "ChannelScaling"))


@pytest.mark.parametrize("config", [FireQConfig, RTNConfig])
def test_unknown_keys_raise_with_the_near_name(config):
    with pytest.raises(ValueError, match=r"unknown key 'group_sise'; did you mean 'group_size'"):
        config.from_dict({"group_sise": 32})
    with pytest.raises(ValueError, match="a dictionary is needed"):
        config.from_dict([1])


CONFIGS = st.builds(
    FireQConfig,
    mode=st.sampled_from(["exact", "fold"]),
    group_size=st.sampled_from([16, 64, 128]),
    per_tensor_scale=st.sampled_from(["auto", "repo", "none", 4.0]),
    channel_scaling=st.one_of(
        st.just("auto"), st.just(()), st.just((ChannelScaling("mlp_output", "max", 0.5), ChannelScaling("mlp_input")))
    ),
    search=st.lists(st.floats(0, 2), max_size=3).map(tuple),
    kv_bits=st.sampled_from([4, 16]),
)


@given(CONFIGS)
def test_config_survives_json(config):
    assert FireQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("std", [1e-5, 0.02 / 256, 0.02 / 16, 0.02, 3.0, 300.0])
def test_repo_search_takes_the_smallest_p_without_shortfall_below_saturation(std):
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)) * std
    absmax = weight.view(32, 2, 128).abs().amax(-1).double()
    allowed = []
    for exponent in range(15):
        if float(absmax.max()) * 2**exponent > 448:
            break
        allowed.append(2.0**exponent)
    shortfall = {p: float((7 * 2.0**-9 - absmax * p).clamp(min=0).sum()) for p in allowed or [1.0]}
    assert repo_per_tensor_scale(weight, 128) == min(shortfall, key=lambda p: (shortfall[p], p))


def test_per_tensor_scale_options_reach_the_weight():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * 0.02 / 16

    def p(**options):
        return round_weight(weight, FireQConfig(mode="fold", **options)).per_tensor_scale

    assert p(per_tensor_scale="none") == 1.0
    assert p(per_tensor_scale=4.0) == 4.0
    assert p(per_tensor_scale="repo") == repo_per_tensor_scale(weight, 128)
    assert p() > p(per_tensor_scale="repo") > 1
    assert round_weight(weight, FireQConfig()).per_tensor_scale == 1.0


def test_search_prefers_protecting_loud_activations():
    config = small_config()
    generator = torch.Generator().manual_seed(0)
    loud = torch.ones(48)
    loud[:4] = 50
    x = torch.randn(64, 48, generator=generator) * loud
    weights = {f"p.mlp.{n}_proj.weight": torch.randn(80, 48, generator=generator) for n in ("gate", "up")}
    weights["p.post_attention_layernorm.weight"] = torch.ones(48)
    error = SiteError(weights, "p.", "mlp_input", x, lambda w: quantize_int4(w, 16).dequantize(), lambda v: v, config)
    mean = x.abs().mean(0).double()
    factor, winner = best_factors(error, torch.ones(48), mean, (0.0, 0.3, 0.6, 0.9))
    assert winner != "weights"
    assert winner != "mean|x|^0"
    assert error(factor) < 0.7 * error(torch.ones(48))
    assert error(factor) == min(error(activation_factors(mean, r, "mlp_input", config)) for r in (0.0, 0.3, 0.6, 0.9))


def test_search_never_leaves_the_layer_output_worse():
    model = small_model()
    config = {
        "group_size": 16,
        "kv_bits": 16,
        "channel_scaling": tuple(ChannelScaling(s) for s in ("mlp_output", "attention_output")),
    }
    searched = quantize_model(model, FireQConfig(**config, search=(0.0, 0.3, 0.6, 0.9)), [tokens()])
    assert sum(int(note.split()[-2]) for note in searched.notes if "search chose" in note) == 4


def test_search_without_a_site_is_refused():
    with pytest.raises(ValueError, match="names no site"):
        quantize_model(small_model(), FireQConfig(channel_scaling=(), search=(0.3,)), [tokens()])
