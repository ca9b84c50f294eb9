# SPDX-License-Identifier: Apache-2.0
"""to_transformers and the INT4 cache against transformers' own classes and float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from tiny_models import KINDS, random_weights, tiny_config, write_gguf, write_transformers

from tilewright.formats import quantize_int4
from tilewright.models import LanguageModel, hf_attention, load, to_transformers
from tilewright.models.hf_names import cache_name
from tilewright.models.int4_cache import Int4CacheLayer, Int4KVCache
from tilewright.nn import Int8Linear, W4A8Linear
from tilewright.ops import quantize_fp8_per_token, quantize_int8_per_token

PROMPT = torch.tensor([[5, 9, 17, 33, 65, 8, 2, 40]])
TYPES = {"llama": {}, "mistral": {"sliding_window": 64}, "qwen2": {"qkv_bias": True}}


def load_tiny(tmp_path, **changes):
    config = tiny_config(**changes)
    return load(write_gguf(tmp_path / "m.gguf", config, random_weights(config)))


@pytest.mark.parametrize("model_type", TYPES)
def test_float_model_gives_transformers_logits(tmp_path, model_type):
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type=model_type, **TYPES[model_type])
    directory = write_transformers(tmp_path / "m", config, random_weights(config))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = to_transformers(load(directory))
    assert type(ours) is type(theirs)
    with torch.no_grad():
        assert torch.equal(ours(PROMPT).logits, theirs(PROMPT).logits)


@pytest.mark.parametrize("act", ["fp8", "int8"])
def test_low_bit_model_is_the_dequantized_one_with_rounded_activations(tmp_path, act):
    """With the inputs of the same linears rounded by the public quantizers, and the same attention (compared with
    float64 in its own tests), the float model follows the low-bit one; what remains are rounding decisions flipped by
    the order of float32 sums."""
    model = load_tiny(tmp_path)
    ours, reference = to_transformers(model, act=act), to_transformers(model, dequantize=True)
    for layer in reference.model.layers:
        hf_attention.attach(layer.self_attn, hf_attention.AttentionFormats("bf16", "fp8"), None)
    reference.set_attn_implementation(hf_attention.NAME)
    low_bit = [name for name, m in ours.named_modules() if isinstance(m, W4A8Linear)]
    assert len(low_bit) == 14
    assert not any(isinstance(m, W4A8Linear) for m in reference.modules())

    def rounded(_module, inputs):
        if act == "fp8":
            codes, scale = quantize_fp8_per_token(inputs[0])
            return (codes.float() * scale[..., None],)
        codes, scale = quantize_int8_per_token(inputs[0], 64)
        return (codes.float() * scale.repeat_interleave(64, -1)[..., : codes.shape[-1]],)

    with torch.no_grad():
        got, plain = ours(PROMPT).logits, reference(PROMPT).logits
        for name in low_bit:
            reference.get_submodule(name).register_forward_pre_hook(rounded)
        need = reference(PROMPT).logits
    assert (got - need).norm() <= 0.1 * (plain - need).norm()


def test_generate_with_and_without_a_cache_gives_the_same_tokens(tmp_path):
    model = to_transformers(load_tiny(tmp_path), act="int8")
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(PROMPT, **arguments)
    assert with_cache.shape == (1, PROMPT.shape[1] + 12)
    assert torch.equal(with_cache, model.generate(PROMPT, use_cache=False, **arguments))


def test_generate_with_the_int4_cache_handles_batches_and_beams(tmp_path):
    loaded = load_tiny(tmp_path)
    model = to_transformers(loaded, act="int8")
    prompts = torch.cat((PROMPT, PROMPT.flip(1)))
    cache = Int4KVCache(loaded)
    out = model.generate(
        prompts, **{cache_name(): cache}, max_new_tokens=6, do_sample=False, num_beams=2, eos_token_id=None
    )
    assert out.shape == (2, PROMPT.shape[1] + 6)
    # 13 cached tokens, 4 beams, 2 heads of 16 channels: 8 bytes of codes and 4 of scale, for keys and values, 2 layers
    assert cache.nbytes == 13 * 4 * 2 * (8 + 4) * 2 * 2


def test_prefill_in_pieces_equals_one_piece_with_the_int4_cache(tmp_path):
    """Rounding is per token, so the cache holds the same numbers; attention differs by the order of float32 sums."""
    loaded = load_tiny(tmp_path)
    model = to_transformers(loaded, dequantize=True, dtype=torch.float64)
    with torch.no_grad():
        whole = model(PROMPT, **{cache_name(): Int4KVCache(loaded)}).logits[0, -1]
        cache = Int4KVCache(loaded)
        model(PROMPT[:, :3], **{cache_name(): cache})
        parts = model(PROMPT[:, 3:], **{cache_name(): cache}).logits[0, -1]
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("low_bit", [False, True])
def test_biases_on_the_inputs_of_attention_only(low_bit):
    """transformers' Llama has them on all four linears or none; a bias of zeros is none."""
    config = tiny_config(qkv_bias=True, output_bias=False)
    weights = random_weights(config)
    name = "model.layers.0.mlp.up_proj.weight"
    if low_bit:
        weights[name] = quantize_int4(weights[name], 32)
    model = to_transformers(LanguageModel(config, weights))
    bias = model.get_submodule("model.layers.1.self_attn.o_proj").bias
    assert bias is None or (bias == 0).all()
    assert torch.equal(
        model.get_submodule("model.layers.1.self_attn.q_proj").bias, weights["model.layers.1.self_attn.q_proj.bias"]
    )
    assert model(PROMPT).logits.isfinite().all()


def test_no_parameter_wants_a_gradient_and_none_is_left_empty(tmp_path):
    model = to_transformers(load_tiny(tmp_path, tie_word_embeddings=False))
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in model.state_dict().values())


def test_q8_linears_stay_int8_unless_dequantized(tmp_path):
    config = tiny_config()
    loaded = load(write_gguf(tmp_path / "m.gguf", config, random_weights(config), KINDS.Q8_0))
    name = "model.layers.0.mlp.up_proj"
    layer = to_transformers(loaded).get_submodule(name)
    assert isinstance(layer, Int8Linear)
    need = loaded.dense(name + ".weight")
    assert torch.equal(layer.rows(torch.arange(need.shape[0])), need)
    assert torch.equal(to_transformers(loaded, dequantize=True).get_submodule(name).weight, need)


@pytest.mark.parametrize("dim", [2, 16, 64, 128, 130, 256])
def test_cached_rows_are_the_nearest_points_of_their_grid(dim):
    generator = torch.Generator().manual_seed(dim)
    keys, values = torch.randn(2, 3, 2, 5, dim, generator=generator)
    layer = Int4CacheLayer()
    layer.update(keys[..., :2, :], values[..., :2, :])
    for x, back in zip((keys, values), layer.update(keys[..., 2:, :], values[..., 2:, :]), strict=True):
        for start in range(0, dim, 128):
            part, got = x[..., start : start + 128].double(), back[..., start : start + 128].double()
            step = part.abs().amax(-1, keepdim=True) / 7
            # half a step, and a few float32 roundings of scale and product
            assert ((part - got).abs() <= step * (0.5 + 32 * 2**-24)).all()
    assert layer.keys.shape[-1] == dim // 2 + 4 * -(-dim // 128)
    assert layer.get_seq_length() == 5


def test_zero_and_non_finite_rows():
    x = torch.zeros(1, 1, 3, 16)
    x[0, 0, 1, 3] = torch.nan
    x[0, 0, 2, 3] = torch.inf
    back, _ = Int4CacheLayer().update(x, x)
    assert (back[0, 0, 0] == 0).all()
    assert back[0, 0, 1:].isnan().all()


def test_key_scale_is_undone_on_the_way_out():
    """A channel of 64 makes the step 64/7, so that all others round to zero; scaled down first, their step is at most
    4/7, whose rounding error is 4/7/sqrt(12) of their spread."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 6, 16, generator=generator)
    keys[..., 3] = 64
    scale = torch.ones(2, 16)
    scale[:, 3] = 1 / 64
    errors = []
    for layer in (Int4CacheLayer(), Int4CacheLayer(scale)):
        got, _ = layer.update(keys, keys)
        small = torch.arange(16) != 3
        errors.append(float((got - keys)[..., small].norm() / keys[..., small].norm()))
    assert errors[0] == 1
    assert errors[1] < 4 / 7 / 12**0.5
