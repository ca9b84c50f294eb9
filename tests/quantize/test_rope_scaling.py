# SPDX-License-Identifier: Apache-2.0
"""RoPE-aware key scaling: the statistics are those of transformers' own keys, and the function stays."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import small_config, small_model, tokens

from tilewright.capture import observe
from tilewright.models import RopeScaling, to_transformers
from tilewright.models.hf_names import cache_name
from tilewright.quantize.fireq.rope import KeyRange, calibrate_keys, key_scales, key_site, scale_rows
from tilewright.quantize.simulate import Simulation, simulated
from tilewright.reducers import AbsMax
from tilewright.reference.low_bit import attention_oracle

ROPES = {
    "plain": {},
    "linear": {"rope_scaling": RopeScaling("linear", factor=2.0)},
    "llama3": {"rope_scaling": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=16)},
    "yarn": {"rope_scaling": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16)},
    "biased": {"model_type": "qwen2", "qkv_bias": True},
}


def cached_keys(module, ids):
    """Keys after RoPE as transformers caches them: one [B, H_kv, T, D] per layer."""
    with torch.no_grad():
        return [layer.keys for layer in module(ids, use_cache=True)[cache_name()].layers]


@pytest.mark.parametrize("name", ROPES)
def test_calibration_sees_the_keys_that_transformers_caches(name):
    model = small_model(**ROPES[name])
    module = to_transformers(model, dequantize=True)
    ids = tokens(3, 20)
    seen = calibrate_keys(module, model.config, list(ids.split([1, 2])))
    for got, keys in zip(seen, cached_keys(module, ids), strict=True):
        magnitude = keys.abs().amax((0, 2))
        radius = torch.hypot(keys[..., :4], keys[..., 4:]).amax((0, 2))
        # The same float32 rotation with another order of two products: a few roundings of 2^-24 each.
        bound = float(keys.abs().max()) * 2.0**-20
        torch.testing.assert_close(got.magnitude, magnitude, rtol=0, atol=bound)
        torch.testing.assert_close(got.radius, radius, rtol=0, atol=bound)


def test_padding_does_not_reach_the_key_range():
    model = small_model()
    module = to_transformers(model, dequantize=True)
    ids, mask = tokens(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, 8:] = 0
    padded = observe(module, [{"input_ids": ids, "attention_mask": mask}], {key_site(model.config): AbsMax})
    short = observe(module, [ids[:, :8]], {key_site(model.config): AbsMax})
    for name in short:
        torch.testing.assert_close(padded[name], short[name], rtol=1e-6, atol=1e-6)


def brute_force(seen: KeyRange, top_k: int, alpha: float, beta: float):
    """The text of the method, one channel at a time."""
    heads, d = seen.magnitude.shape
    pre, post = torch.ones(heads, d // 2), torch.ones(heads, d)
    for h in range(heads):
        ranked = sorted(range(d), key=lambda c: -float(seen.magnitude[h, c]))[:top_k]
        affected = set(ranked) | {(c + d // 2) % d for c in ranked}
        for c in affected:
            post[h, c] = beta / seen.magnitude[h, c]
        for i in range(d // 2):
            if i not in affected:
                pre[h, i] = alpha / seen.radius[h, i]
    return pre, post


@pytest.mark.parametrize("top_k", [0, 1, 3, 8])
def test_scales_follow_the_definition(top_k):
    generator = torch.Generator().manual_seed(top_k)
    seen = KeyRange(torch.rand(3, 4, generator=generator) + 0.1, torch.rand(3, 8, generator=generator) + 0.1)
    got = key_scales(seen, top_k=top_k, alpha=8.0, beta=4.0)
    pre, post = brute_force(seen, top_k, 8.0, 4.0)
    torch.testing.assert_close(got.pre, pre, rtol=1e-7, atol=0)
    torch.testing.assert_close(got.post, post, rtol=1e-7, atol=0)
    assert torch.equal(got.combined, torch.cat((got.pre, got.pre), 1) * got.post)


def test_each_part_can_be_turned_off():
    seen = KeyRange(torch.full((1, 2), 3.0), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert key_scales(seen, pre=False, top_k=1).pre.tolist() == [[1, 1]]
    assert key_scales(seen, pre=False, top_k=0).combined.tolist() == [[1, 1, 1, 1]]
    with pytest.raises(ValueError, match="the head has 4 channels"):
        key_scales(seen, top_k=5)


def test_channels_that_are_always_zero_keep_one():
    seen = KeyRange(torch.zeros(1, 2), torch.zeros(1, 4))
    for top_k in (0, 4):
        assert key_scales(seen, top_k=top_k).combined.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("placement", ["rows", "online"])
@pytest.mark.parametrize("name", ROPES)
def test_scaling_without_quantizers_leaves_the_function(name, placement):
    model = small_model(**ROPES[name])
    module = to_transformers(model, dequantize=True, dtype=torch.float64)
    ids = tokens()
    ranges = calibrate_keys(module, model.config, [ids])
    scales = [key_scales(seen, top_k=2) for seen in ranges]
    with torch.no_grad():
        before = module(ids).logits
        online = [s.combined.double() for s in scales]
        if placement == "rows":
            weights = {n: p.data for n, p in module.named_parameters()}
            for i, s in enumerate(scales):
                scale_rows(weights, f"model.layers.{i}.self_attn.", s.pre.double(), model.config)
            for n, p in module.named_parameters():
                p.data = weights[n]
            online = [s.post.double() for s in scales]
        with simulated(module, Simulation(), online):
            after = module(ids).logits
    assert max(float(s.combined.max() / s.combined.min()) for s in scales) > 4
    # Scale and inverse scale cancel to 2^-52 each; two layers, sums over at most 80 terms, and a softmax whose
    # scores reach some hundreds: 2^-36 is 16 bits above that.
    assert float((after - before).abs().max()) <= 2.0**-36 * float(before.abs().max())


def test_simulation_rounds_what_the_attention_oracle_rounds():
    model = small_model()
    module = to_transformers(model, dequantize=True, dtype=torch.float64)
    ids = tokens(1, 10)
    seen = {}
    from tilewright.capture import Site, tapped

    def heads(x):
        return x.unflatten(-1, (-1, 8))

    sites = {
        Site("model.layers.0.self_attn.q_proj", transform=heads): seen.__setitem__,
        Site("model.layers.0.self_attn.v_proj", transform=heads): seen.__setitem__,
        Site("model.layers.0.self_attn.o_proj", "input", heads): seen.__setitem__,
    }
    with torch.no_grad(), simulated(module, Simulation(query="fp8", key_bits=4, value_bits=4)), tapped(module, sites):
        module(ids, use_cache=False)
    from tilewright.quantize.fireq.rope import rotate

    q = rotate(seen["model.layers.0.self_attn.q_proj@output"], model.config)[0]
    v = seen["model.layers.0.self_attn.v_proj@output"][0]
    k = cached_keys(module, ids)[0][0].transpose(0, 1)
    expected = attention_oracle(q, k, v)
    got = seen["model.layers.0.self_attn.o_proj@input"][0]
    exact = attention_oracle(q, k, v, kv_bits=None, query="none")
    assert float((expected - exact).abs().max()) > 1e-3
    # float64 on both sides, but the rotation's angles are float32 and torch's e4m3 cast passes through
    # float32: a value on a tie may fall to the other side, moving one of ten weights by one e4m3 step.
    assert float((got - expected).norm() / (expected - exact).norm()) < 0.05


def test_simulation_is_gone_afterwards():
    module = to_transformers(small_model(), dequantize=True)
    ids = tokens()
    with torch.no_grad():
        before = module(ids).logits
        with simulated(module, Simulation("int8", "fp8", 3, 3)):
            during = module(ids).logits
        with pytest.raises(RuntimeError, match="stop"), simulated(module, Simulation("fp8")):
            raise RuntimeError("stop")
        after = module(ids).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, during)


def test_more_bits_are_closer():
    module = to_transformers(small_model(), dequantize=True)
    ids = tokens()
    errors = []
    with torch.no_grad():
        exact = module(ids).logits
        for bits in (3, 4, 6, 8):
            with simulated(module, Simulation(key_bits=bits, value_bits=bits)):
                errors.append(float((module(ids).logits - exact).norm()))
    assert errors == sorted(errors, reverse=True)
    assert math.isfinite(errors[0])


def test_scaling_helps_keys_with_large_channels():
    model = small_model()
    module = to_transformers(model, dequantize=True)
    ids = tokens()
    scales = [key_scales(s, top_k=1).combined for s in calibrate_keys(module, model.config, [ids])]
    keys = cached_keys(module, ids)
    from tilewright.reference.low_bit import fake_quantize

    for k, s in zip(keys, scales, strict=True):
        factor = s[None, :, None]
        plain = (fake_quantize(k, 8) - k).square().mean((0, 2))
        scaled = (fake_quantize(k * factor, 8) / factor - k).square().mean((0, 2))
        assert float(scaled.sum()) != float(plain.sum())
        small = torch.ones(8, dtype=torch.bool)
        small[[3, 7]] = False
        # Channels beside the large one get back the resolution that it took from them.
        assert float(scaled[:, small].sum()) < 0.2 * float(plain[:, small].sum())


def test_rows_scale_every_query_head_of_the_group():
    config = small_config(qkv_bias=True)
    weights = {
        "a.k_proj.weight": torch.ones(16, 48),
        "a.k_proj.bias": torch.ones(16),
        "a.q_proj.weight": torch.ones(48, 48),
        "a.q_proj.bias": torch.ones(48),
    }
    pre = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    scale_rows(weights, "a.", pre, config)
    keys = torch.cat((pre, pre), 1)
    assert torch.equal(weights["a.k_proj.bias"].view(2, 8), keys)
    assert torch.equal(weights["a.k_proj.weight"][:, 0].view(2, 8), keys)
    assert torch.equal(weights["a.q_proj.weight"][:, 5].view(2, 3, 8), (1 / keys)[:, None].expand(2, 3, 8))
    assert torch.equal(weights["a.q_proj.bias"].view(2, 3, 8), (1 / keys)[:, None].expand(2, 3, 8))


@pytest.mark.parametrize("what", [Simulation("fp4"), Simulation("fp8", activation_group=16), Simulation(query="fp4")])
def test_unknown_roundings_are_refused(what):
    module = to_transformers(small_model(), dequantize=True)
    with pytest.raises(ValueError, match="activation"), simulated(module, what):
        pass


def test_grouped_activations_are_rounded_group_by_group():
    module = to_transformers(small_model(), dequantize=True)
    seen = {}
    from tilewright.capture import tapped
    from tilewright.reference.low_bit import fake_int8

    name = "model.layers.0.mlp.down_proj@input"
    with torch.no_grad(), tapped(module, {name: seen.__setitem__}):
        with simulated(module, Simulation()):
            module(tokens())
        plain = seen[name]
    with (
        torch.no_grad(),
        simulated(module, Simulation("int8", activation_group=16)),
        tapped(module, {"**.down_proj@input": seen.__setitem__}),
    ):
        module(tokens())
    rounded = seen[name]
    assert torch.equal(rounded, fake_int8(rounded, 16))
    assert not torch.equal(plain, fake_int8(plain, 16))
