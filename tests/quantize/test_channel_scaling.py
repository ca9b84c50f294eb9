# SPDX-License-Identifier: Apache-2.0
"""Channel scaling changes weights and nothing else: logits in float64 are those of the original."""

from __future__ import annotations

import pytest
import torch
from small_models import small_config, small_model, tokens

from tilewright.models import to_transformers
from tilewright.quantize.fireq import ChannelScaling
from tilewright.quantize.fireq.channels import CONSUMERS, channel_factors, scale_channels, scale_values
from tilewright.quantize.fireq.config import SITES

BIASED = [{}, {"qkv_bias": True, "output_bias": True, "mlp_bias": True}, {"model_type": "qwen2", "qkv_bias": True}]


def float64_module(**changes):
    module = to_transformers(small_model(**changes), dequantize=True, dtype=torch.float64)
    return module, {name: p.data for name, p in module.named_parameters()}


def put(module, weights):
    for name, p in module.named_parameters():
        p.data = weights[name]


def logits(module):
    with torch.no_grad():
        return module(tokens()).logits


def assert_same_function(module, weights, before):
    put(module, weights)
    # Every product of scaled by inverse scale is exact to 2 roundings of 2^-53; two layers of sums over at
    # most 80 terms keep the relative error below 80 * 2^-50.
    after = logits(module)
    assert float((after - before).abs().max()) <= 80 * 2.0**-50 * float(before.abs().max())


@pytest.mark.parametrize("changes", BIASED)
@pytest.mark.parametrize("stat", ["max", "mean"])
@pytest.mark.parametrize("site", SITES)
def test_scaling_preserves_the_function(site, stat, changes):
    module, weights = float64_module(**changes)
    before, scaled = logits(module), dict(weights)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        factor = channel_factors(scaled, prefix, ChannelScaling(site, stat), small_config(**changes))
        assert float(factor.max() / factor.min()) > 2
        scale_channels(scaled, prefix, site, factor, small_config(**changes))
    assert_same_function(module, scaled, before)


@pytest.mark.parametrize("changes", BIASED)
def test_value_factor_preserves_the_function(changes):
    module, weights = float64_module(**changes)
    before, scaled = logits(module), dict(weights)
    for layer in range(2):
        scale_values(scaled, f"model.layers.{layer}.", 0.9)
    assert torch.equal(
        scaled["model.layers.0.self_attn.v_proj.weight"], weights["model.layers.0.self_attn.v_proj.weight"] * 0.9
    )
    assert_same_function(module, scaled, before)


@pytest.mark.parametrize("site", SITES)
def test_max_scaling_flattens_the_columns(site):
    config = small_config()
    _, weights = float64_module()
    factor = channel_factors(weights, "model.layers.0.", ChannelScaling(site, "max", 0.5), config)
    scale_channels(weights, "model.layers.0.", site, factor, config)
    rows = torch.cat([weights[f"model.layers.0.{name}.weight"] for name in CONSUMERS[site]])
    columns = rows.abs().amax(0)
    if site == "attention_output":
        # Three query heads read each value channel: the largest of the three columns reaches the constant.
        columns = columns.view(2, 3, 8).amax(1)
    torch.testing.assert_close(columns, torch.full_like(columns, 0.5), rtol=1e-14, atol=0)


def test_heads_of_a_group_share_their_factor():
    config = small_config()
    _, weights = float64_module()
    before = weights["model.layers.0.self_attn.o_proj.weight"]
    factor = channel_factors(weights, "model.layers.0.", ChannelScaling("attention_output"), config)
    assert factor.shape == (config.num_key_value_heads * config.head_dim,)
    scale_channels(weights, "model.layers.0.", "attention_output", factor, config)
    ratio = (weights["model.layers.0.self_attn.o_proj.weight"] / before)[0].view(6, 8)
    for head in range(6):
        torch.testing.assert_close(ratio[head], factor.view(2, 8)[head // 3], rtol=1e-14, atol=0)


def test_automatic_constant_keeps_the_gain():
    _, weights = float64_module()
    factor = channel_factors(weights, "model.layers.0.", ChannelScaling("mlp_output", "mean"), small_config())
    assert abs(float(factor.log().mean())) < 1e-12


def test_dead_column_keeps_one():
    _, weights = float64_module()
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][:, 5] = 0
    factor = channel_factors(weights, "model.layers.0.", ChannelScaling("mlp_output"), small_config())
    assert factor[5] == 1
    assert bool(torch.isfinite(factor).all())


def test_given_tensors_are_not_written_into():
    _, weights = float64_module()
    copies = {name: w.clone() for name, w in weights.items()}
    originals = dict(weights)
    factor = channel_factors(weights, "model.layers.0.", ChannelScaling("mlp_input"), small_config())
    scale_channels(weights, "model.layers.0.", "mlp_input", factor, small_config())
    assert all(torch.equal(originals[name], copies[name]) for name in copies)
