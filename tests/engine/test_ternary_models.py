# SPDX-License-Identifier: Apache-2.0
"""Ternary models on the decode engine: against float64 with exact integers, against the per-operator path, saved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engine_models import VOCABULARY, engine_config, token_ids
from torch import Tensor

from tilewright.formats import PackedTernary, pack_ternary
from tilewright.models import CheckpointError, LanguageModel, load, save, to_transformers
from tilewright.models.cuda_engine import CudaEngine
from tilewright.models.engine import Engine
from tilewright.models.image import compile
from tilewright.models.language_model import Weight, expected_shapes, linear_names
from tilewright.testing import isa_level, isa_levels

MODELS: dict[str, dict[str, Any]] = {
    "bitnet": {"model_type": "bitnet"},
    "squared relu": {"model_type": "bitnet", "hidden_act": "relu2"},
    "llama": {},
    "own head": {"model_type": "bitnet", "tie_word_embeddings": False},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "ragged": {"hidden_size": 72, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 36,
               "intermediate_size": 130, "model_type": "bitnet"},
}  # fmt: skip


def ternary_model(seed: int = 0, *, per_row: bool = False, packing: str = "t5", **changes: Any) -> LanguageModel:
    """Ternary linears with a scale for each matrix or row, a bfloat16 embedding."""
    config = engine_config(**changes)
    generator = torch.Generator().manual_seed(seed)
    linears = set(linear_names(config))
    weights: dict[str, Weight] = {}
    for name, shape in expected_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if name in linears:
            codes = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
            scale = torch.rand(shape[0] if per_row else 1, generator=generator) * 0.2 + 0.1
            weights[name] = pack_ternary(codes, packing, scale=scale)  # type: ignore[arg-type]
        elif len(shape) == 2:
            weights[name] = values.to(torch.bfloat16)
        else:
            weights[name] = values * 0.15 + (1 if "norm" in name else 0)
    return LanguageModel(config, weights, source="small")


class Oracle:
    """The model in float64; linears as int64 products of rounded activations."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.config = model, model.config

    def logits(self, ids: list[int]) -> Tensor:
        c, w = self.config, self.model.weights
        x = self.model.dense("model.embed_tokens.weight", torch.float64)[ids]
        for i in range(c.num_hidden_layers):
            p = f"model.layers.{i}."
            a, m = p + "self_attn.", p + "mlp."
            h = self.norm(x, p + "input_layernorm")
            q, k, v = (self.linear(h, a + n) for n in ("q_proj", "k_proj", "v_proj"))
            y = self.attention(q, k, v)
            if c.has_sub_norms:
                y = self.norm(y, a + "attn_sub_norm")
            x = x + self.linear(y, a + "o_proj")
            h = self.norm(x, p + "post_attention_layernorm")
            gate, up = self.linear(h, m + "gate_proj"), self.linear(h, m + "up_proj")
            act = gate / (1 + (-gate).exp()) if c.hidden_act == "silu" else gate.clamp(min=0).square()
            y = act * up
            if c.has_sub_norms:
                y = self.norm(y, m + "ffn_sub_norm")
            x = x + self.linear(y, m + "down_proj")
        assert w
        return self.norm(x, "model.norm") @ self.model.dense(self.model.output_name, torch.float64).T

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.model.dense(name + ".weight", torch.float64)
        return weight * x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.model.weights[name + ".weight"]
        assert isinstance(weight, PackedTernary)
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        codes = (x / scale).round().to(torch.int64)
        acc = codes @ weight.unpack().to(torch.int64).T
        y = acc.double() * scale * weight.scale.double()
        bias = self.model.weights.get(name + ".bias")
        return y if bias is None else y + bias.double()  # type: ignore[union-attr]

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self.config
        tokens = q.shape[0]
        angles = torch.arange(tokens)[:, None] * c.rope_frequencies().double()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def turn(t: Tensor, heads: int) -> Tensor:
            a, b = t.view(tokens, heads, c.head_dim).chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        group = c.num_attention_heads // c.num_key_value_heads
        q = turn(q, c.num_attention_heads)
        k = turn(k, c.num_key_value_heads).to(torch.bfloat16).double().repeat_interleave(group, 1)
        v = v.view(tokens, -1, c.head_dim).to(torch.bfloat16).double().repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(c.head_dim)
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        return torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)


def engine_of(model: LanguageModel, **options: Any) -> Engine:
    return Engine(compile(model, "int8", "bf16", "float32"), 64, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_float64(kind: str, level: str) -> None:
    """A code is a rounding: where float32 falls on the other side of a half, one code of one token changes by one.

    The bound is three times the distance to the same model when what each linear reads is moved by half a bfloat16
    step, which is what the cache alone does to attention: codes fall otherwise by the same mechanism.
    """
    del level
    model = ternary_model(**MODELS[kind])
    ids = token_ids(24)
    exact = Oracle(model).logits(ids)
    noisy = _NoisyOracle(model).logits(ids)
    noise = float((noisy - exact).norm() / exact.norm())
    got = engine_of(model).logits(ids).double()
    distance = float((got - exact).norm() / exact.norm())
    assert noise < 0.2, "the oracle is too unsteady to tell anything"
    assert distance <= 3 * noise + 1e-4


class _NoisyOracle(Oracle):
    """Inputs of the linears moved by a bfloat16 rounding of values, as the cache's: some codes fall otherwise."""

    def linear(self, x: Tensor, name: str) -> Tensor:
        return super().linear(x * (1 + 2.0**-9 * torch.sign(torch.sin(1e4 * x))), name)


def test_one_layer_is_exact_in_integers() -> None:
    """Where nothing but a linear comes in between, the engine's result is the operator's, bit for bit."""
    model = ternary_model(num_hidden_layers=1, model_type="bitnet")
    ids = token_ids(5)
    with torch.no_grad():
        theirs = to_transformers(model, kv_bits=16)
        hidden = theirs.model.embed_tokens(torch.tensor(ids))
        layer = theirs.model.layers[0]
        got = layer.self_attn.q_proj(layer.input_layernorm(hidden))
    weight = model.weights["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(weight, PackedTernary)
    normed = layer.input_layernorm(hidden)
    scale = normed.abs().amax(-1, keepdim=True) / 127
    codes = (normed / scale).round().to(torch.int64)
    acc = codes @ weight.unpack().to(torch.int64).T
    assert torch.equal(got, acc.float() * (scale * weight.scale))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("kv_bits", [4, 16])
def test_the_per_operator_path_gives_the_engines_bits(kind: str, kv_bits: int, level: str) -> None:
    del level
    model = ternary_model(**MODELS[kind])
    theirs = to_transformers(model, kv_bits=kv_bits)
    engine = Engine(model, 64, kv_bits=kv_bits)
    ids = token_ids(21)
    with torch.no_grad():
        assert torch.equal(theirs(torch.tensor([ids])).logits[0], engine.logits(ids))
        theirs.generation_config.eos_token_id = None
        tokens = theirs.generate(torch.tensor([ids[:8]]), max_new_tokens=12, do_sample=False)[0, 8:].tolist()
    assert tokens == list(engine.generate(ids[:8], max_new_tokens=12, stop_tokens=()))


def test_levels_blocks_and_threads_give_the_same_bits() -> None:
    model = ternary_model(model_type="bitnet", hidden_act="relu2", per_row=True)
    ids = token_ids(30)
    whole = engine_of(model).logits(ids)
    pieces = engine_of(model)
    parts = [pieces.forward([ids[a:b]], all_logits=True) for a, b in ((0, 1), (1, 2), (2, 5), (5, 30))]
    assert torch.equal(torch.cat(parts), whole)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(engine_of(model).logits(ids), whole)
    finally:
        torch.set_num_threads(before)
    for name in isa_levels():
        with isa_level(name):
            got = engine_of(model).logits(ids)
        # Norms and attention sum in the order of a level's width; integers do not care.
        assert float((got - whole).norm() / whole.norm()) < 0.2


def test_a_scale_a_row_and_mixed_formats() -> None:
    model = ternary_model(per_row=True, num_hidden_layers=1)
    name = "model.layers.0.self_attn.k_proj.weight"
    up = "model.layers.0.mlp.up_proj.weight"
    model.weights[name] = model.dense(name).to(torch.bfloat16)
    model.weights[up] = model.dense(up).to(torch.bfloat16)
    image = compile(model, "int8", "bf16", "float32")
    assert any("gate and up come in different formats" in note for note in image.notes)
    theirs = to_transformers(model, kv_bits=16, query="float32")
    ids = token_ids(9)
    with torch.no_grad():
        assert torch.equal(theirs(torch.tensor([ids])).logits[0], Engine(image, 64).logits(ids))


def test_a_ternary_embedding_and_head() -> None:
    model = ternary_model(model_type="bitnet")
    codes = torch.randint(-1, 2, (VOCABULARY, 64), dtype=torch.int8)
    for scale in (torch.rand(1) + 0.5, torch.rand(VOCABULARY) + 0.5):
        model.weights["model.embed_tokens.weight"] = pack_ternary(codes, "q2", scale=scale)
        ids = token_ids(9)
        with torch.no_grad():
            theirs = to_transformers(model, kv_bits=16)
            assert torch.equal(theirs(torch.tensor([ids])).logits[0], Engine(model, 64).logits(ids))


@pytest.mark.parametrize("packing", ["q2", "t3w", "t5", "hf"])
def test_checkpoints_keep_every_bit(tmp_path: Any, packing: str) -> None:
    model = ternary_model(packing=packing, model_type="bitnet", hidden_act="relu2")
    save(model, tmp_path / "m")
    back = load(tmp_path / "m")
    assert back.config == model.config
    for name, weight in model.weights.items():
        other = back.weights[name]
        if isinstance(weight, PackedTernary):
            assert isinstance(other, PackedTernary)
            assert (other.format, other.shape) == (weight.format, weight.shape)
            assert torch.equal(other.data, weight.data)
            assert torch.equal(other.scale, weight.scale)
        else:
            assert torch.equal(other, weight)  # type: ignore[arg-type]
    ids = token_ids(12)
    assert torch.equal(engine_of(back).logits(ids), engine_of(model).logits(ids))


def test_damaged_ternary_records_are_refused(tmp_path: Any) -> None:
    model = ternary_model()
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = model.weights[name]
    assert isinstance(weight, PackedTernary)
    tensors = weight.to_tensors(name)
    with pytest.raises(ValueError, match="recorded as"):
        PackedTernary.from_tensors(name, tensors, weight.metadata() | {"shape": [1, 2]})
    with pytest.raises(ValueError, match="missing"):
        PackedTernary.from_tensors(name, {})
    scale = torch.tensor([float("nan")])
    model.weights[name] = PackedTernary(weight.data, weight.shape, weight.format, scale)
    with pytest.raises(CheckpointError, match="NaN"):
        save(model, tmp_path / "m")


def test_damaged_images_are_refused() -> None:
    model = ternary_model(num_hidden_layers=1, model_type="bitnet")
    image = compile(model, "int8", "bf16")
    engine = Engine(image, 16)
    magic = torch.tensor(list(b"TILEWRT\0"), dtype=torch.uint8)
    weights = image.weights
    at = [i for i in range(0, weights.numel() - 64, 64) if torch.equal(weights[i : i + 8], magic)]
    packed = [i for i in at if weights[i + 10 : i + 12].view(torch.int16).item() == _format_of_ternary(model)]
    assert packed
    before = weights.clone()
    for offset in (10, 16, 24, 40):  # format, variant or rows, columns, payload bytes
        weights[packed[0] + offset] ^= 0x15
        with pytest.raises(RuntimeError):
            engine.forward([[1]])
        weights.copy_(before)
    assert bool(engine.forward([[1]]).isfinite().all())


def _format_of_ternary(model: LanguageModel) -> int:
    weight = model.weights["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(weight, PackedTernary)
    return int(weight.data[10:12].view(torch.int16).item())


def test_cuda_engine_says_what_runs_it() -> None:
    with pytest.raises(ValueError, match="Engine on the CPU"):
        CudaEngine(ternary_model(), 16, device="cpu")
