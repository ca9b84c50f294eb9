# SPDX-License-Identifier: Apache-2.0
"""CrossQuant on small random models: what is folded where, that folding keeps the function, and bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import small_model, tokens
from torch import nn

from tilewright.formats import Int4Weight
from tilewright.quantize import method
from tilewright.quantize.crossquant import (
    CrossQuantConfig,
    CrossQuantLinear,
    Fold,
    apply_crossquant_,
    calibrate,
    folds_of,
    kernel_report,
    quantize_model,
    smoothquant_choice,
)
from tilewright.quantize.crossquant.fold import groups_of
from tilewright.quantize.crossquant.linear import divide_outputs_, weight_of

transformers = pytest.importorskip("transformers")


def made(family):
    """A random model of a family with uneven norms, so that some activation channels are large."""
    torch.manual_seed(3)
    if family in ("llama", "qwen2"):
        kind = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family]
        config = kind(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        )  # fmt: skip
    elif family in ("opt", "opt-gelu"):
        config = transformers.OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0,
            activation_function="relu" if family == "opt" else "gelu",
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                parameter.mul_(torch.exp(torch.randn(len(parameter))))
            elif "bias" in name:
                parameter.normal_(0, 0.05)
            elif parameter.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.mul_(5)
    return model


FAMILIES = ("llama", "qwen2", "opt", "opt-gelu", "gpt2")


def logits(model):
    with torch.no_grad():
        return model(tokens(2, 20) % 64).logits


def seen_by(model):
    return calibrate(model, [tokens(2, 24, seed=s) % 64 for s in range(2)])


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_keeps_the_function(family):
    """All divisions of a family, and the columns multiplied in float: logits as before."""
    model = made(family)
    before = logits(model)
    modules = dict(model.named_modules())
    for group in groups_of(model, folds_of(model), ("lm_head",)):
        if group.producer is None:
            continue
        width = weight_of(modules[group.consumers[0]]).shape[1] // group.rule.repeat
        shared = torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(1)))
        part = None
        if group.rule.part is not None:
            part = slice(group.rule.part * width, (group.rule.part + 1) * width)
        divide_outputs_(modules[group.producer], shared, part)
        with torch.no_grad():
            for name in group.consumers:
                weight_of(modules[name]).mul_(group.rule.expanded(shared))
    # Each of a few dozen float32 products is rounded anew.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_stay_near_and_beat_per_token(family, fold):
    model = made(family)
    exact, seen = logits(model), seen_by(model)
    errors = {}
    for alpha in (0.5, 1.0):
        small = copy.deepcopy(model)
        chosen = apply_crossquant_(small, CrossQuantConfig(alpha=alpha, a_bits=6, fold=fold), seen)
        assert set(chosen) == set(seen)
        assert all(isinstance(small.get_submodule(name), CrossQuantLinear) for name in seen)
        errors[alpha] = float((logits(small) - exact).square().mean() / exact.square().mean())
    assert errors[0.5] < errors[1.0]
    assert errors[0.5] < 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folded_and_online_layers_agree(family):
    model = made(family)
    seen = seen_by(model)
    outputs = []
    for fold in (True, False):
        small = copy.deepcopy(model)
        apply_crossquant_(small, CrossQuantConfig(fold=fold), seen)
        outputs.append(logits(small))
    exact = logits(model)
    between = float((outputs[0] - outputs[1]).square().mean())
    assert between < float((outputs[0] - exact).square().mean())


def test_what_is_folded_in_a_gpt2():
    small = made("gpt2")
    apply_crossquant_(small, CrossQuantConfig(), seen_by(small))
    block = small.transformer.h[0]
    assert block.attn.c_attn.folded
    assert block.attn.c_proj.folded
    assert not block.mlp.c_proj.folded
    assert isinstance(small.lm_head, nn.Linear)


def test_grouped_queries_share_their_factor():
    small = made("llama")
    chosen = apply_crossquant_(small, CrossQuantConfig(), seen_by(small))
    u = chosen["model.layers.0.self_attn.o_proj"].factor.view(2, 2, 8)
    assert torch.equal(u[:, 0], u[:, 1])
    q, k = (chosen[f"model.layers.0.self_attn.{name}_proj"].factor for name in "qk")
    assert torch.equal(q, k)


def test_search_is_no_worse_on_its_sample_than_any_exponent():
    model = made("llama")
    seen = seen_by(model)
    config = CrossQuantConfig(a_bits=4, alpha="search", mode="auto", alphas=(0.0, 0.15, 0.5, 1.0))
    chosen = apply_crossquant_(copy.deepcopy(model), config, seen)
    name = "model.layers.1.mlp.down_proj"
    x, weight = seen[name].sample, model.get_submodule(name).weight.detach()
    exact = x @ weight.T
    for alpha in config.alphas:
        for mode in ("tight", "static"):
            layer = CrossQuantLinear.from_linear(
                model.get_submodule(name), seen[name].col_absmax, a_bits=4, alpha=alpha, mode=mode
            )
            error = float((layer(x) - exact).square().sum() / exact.square().sum())
            assert chosen[name].error <= error * (1 + 1e-5)


def test_unknown_family_is_scaled_online_and_rules_can_be_declared():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 5)

        def forward(self, x):
            return self.second(self.first(self.norm(x)).relu())

    torch.manual_seed(0)
    net, x = Net(), torch.randn(30, 12)
    seen = calibrate(net, [x])
    exact = net(x).detach()
    for rules, folded in ((None, False), ([Fold("norm", ("first",)), Fold("first", ("second",))], True)):
        small = copy.deepcopy(net)
        apply_crossquant_(small, CrossQuantConfig(), seen, rules=rules)
        assert (small.first.folded, small.second.folded) == (folded, folded)
        assert float((small(x) - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Fold(None, ("frist",))], "near names: first"),
        ([Fold("*", ("first",))], "different numbers"),
        ([Fold(None, ("first",)), Fold(None, ("first",))], "named by two rules"),
    ],
)
def test_rules_that_do_not_fit_change_nothing(rules, message):
    net = nn.Sequential()
    net.add_module("first", nn.Linear(4, 4))
    net.add_module("second", nn.Linear(4, 4))
    seen = calibrate(net, [torch.randn(5, 4)])
    with pytest.raises(ValueError, match=message):
        apply_crossquant_(net, CrossQuantConfig(), seen, rules=rules)
    assert isinstance(net.first, nn.Linear)


def test_bad_calibration_is_named():
    model = made("llama")
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="no linear layer"):
        calibrate(nn.ReLU(), [torch.ones(1, 2)])
    with pytest.raises(ValueError, match="was not calibrated"):
        apply_crossquant_(model, CrossQuantConfig(), {})
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj@input.*NaN"):
        seen_by(model)


def test_first_position_can_be_left_out_of_the_maxima():
    net = nn.Sequential(nn.Linear(2, 1))
    x = torch.tensor([[[100.0, 0.1], [1.0, 2.0], [-3.0, 0.5]]])
    assert calibrate(net, [x])["0"].col_absmax.tolist() == [100, 2]
    assert calibrate(net, [x], exclude_first=True)["0"].col_absmax.tolist() == [3, 2]


def test_padding_does_not_reach_the_maxima():
    model = made("llama")
    ids, mask = tokens(2, 12) % 64, torch.ones(2, 12, dtype=torch.long)
    mask[0, 6:] = 0
    changed = ids.clone()
    changed[0, 6:] = 5
    first, second = (calibrate(model, [{"input_ids": i, "attention_mask": mask}]) for i in (ids, changed))
    assert all(torch.equal(first[name].col_absmax, second[name].col_absmax) for name in first)


def test_smoothquant_takes_the_place_of_the_choice():
    model = made("llama")
    seen = seen_by(model)
    small = copy.deepcopy(model)
    apply_crossquant_(small, CrossQuantConfig(), seen, choose=smoothquant_choice((0.3, 0.5, 0.7)))
    exact = logits(model)
    assert float((logits(small) - exact).square().mean() / exact.square().mean()) < 0.05


def test_report_names_every_layer():
    model = made("llama")
    seen = seen_by(model)
    report = kernel_report(model, seen, a_bits=6)
    assert [one.name for one in report] == list(seen)
    mean = {m: sum(one.kernel[m] for one in report) / len(report) for m in ("per token", "CrossQuant")}
    assert mean["CrossQuant"] < mean["per token"]
    assert all(one.outlier_ratio >= 1 and one.sqnr["CrossQuant"] > 10 for one in report)


def test_checkpoint_gets_folded_int4_weights():
    model = small_model()
    small = quantize_model(model, CrossQuantConfig(w_bits=4, group_size=16), [tokens()])
    assert small.settings["method"] == "crossquant"
    assert small.settings["activations"] == "int8"
    assert isinstance(small.weights["model.layers.0.mlp.down_proj.weight"], Int4Weight)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(small.dense(norm), model.dense(norm))
    u = model.dense(norm) / small.dense(norm)
    name = "model.layers.0.self_attn.q_proj.weight"
    folded = model.dense(name) * u
    largest = folded.abs().unflatten(1, (-1, 16)).amax(-1).repeat_interleave(16, 1)
    # Half a step of max / 7, and a bfloat16 scale that moves up to 7 steps by 2^-9 each.
    assert bool(((small.dense(name) - folded).abs() <= largest * (1 / 14 + 2.0**-8)).all())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CrossQuantConfig(), "w_bits=4"),
        (CrossQuantConfig(w_bits=4, a_bits=6), "INT8 activations"),
        (CrossQuantConfig(w_bits=4, mode="static"), "tight"),
    ],
)
def test_checkpoints_take_what_the_engine_has(config, message):
    with pytest.raises(ValueError, match=message):
        quantize_model(small_model(), config, [tokens()])


def test_the_quantizer_is_found_by_name_and_its_defaults_run():
    found = method("crossquant")
    small = found.quantize_model(small_model(), found.config.from_dict({}), [tokens()])
    assert found.config.from_dict(small.settings["config"]) == found.config()


def test_checkpoint_needs_calibration_and_is_quantized_once():
    with pytest.raises(ValueError, match="needs calibration_batches"):
        quantize_model(small_model())
    small = quantize_model(small_model(), None, [tokens()])
    with pytest.raises(ValueError, match="already quantized"):
        quantize_model(small, None, [tokens()])
