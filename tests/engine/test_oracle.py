# SPDX-License-Identifier: Apache-2.0
"""The engine's logits against a float64 model with the same rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_models import engine_model, token_ids
from engine_oracle import ARITHMETIC_NOISE, BFLOAT16_NOISE, Formats, Oracle, distance

from tilewright.models import RopeScaling
from tilewright.models.engine import Engine
from tilewright.models.image import compile
from tilewright.testing import isa_level, isa_levels

FORMATS = {
    "int8": Formats("int8", "int4", "fp8"),
    "int8_group": Formats("int8", "int4", "fp8", scale_group=32),
    "fp8": Formats("fp8", "int4", "fp8"),
    "int8_bf16_cache": Formats("int8", "bf16", "float32"),
    "fp8_float_query": Formats("fp8", "int4", "float32"),
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "minima": {"symmetric": False},
    "key_scale": {"key_scale": True},
    "bias": {"model_type": "qwen2", "qkv_bias": True},
    "all_biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "window": {"model_type": "mistral", "sliding_window": 9},
    "own_head_int4": {"tie_word_embeddings": False, "head": "int4"},
    "own_head_bf16": {"tie_word_embeddings": False, "head": "bf16"},
    "group_16": {"group": 16, "hidden_size": 96, "intermediate_size": 144},
    "ragged_group": {"group": 64, "hidden_size": 96, "intermediate_size": 160},
    "one_kv_head": {"num_key_value_heads": 1},
    "wide_head": {"head_dim": 40},
    "llama3_rope": {"rope_scaling": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=16)},
    "yarn_rope": {"rope_scaling": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16)},
}


def check(model_options: dict[str, Any], formats: Formats, attention_noise: float = ARITHMETIC_NOISE) -> None:
    model = engine_model(**model_options)
    ids = token_ids(40)
    oracle = Oracle(model, formats)
    exact = oracle.logits(ids)
    bound = oracle.bound(ids, exact, attention_noise)
    assert bound < 0.35, "the oracle is too unsteady to tell anything"
    image = compile(model, formats.act, formats.kv, formats.query, scale_group=formats.scale_group)
    engine = Engine(image, max_length=64)
    block = engine.forward([ids[:23]], all_logits=True)
    steps = [engine.step(token) for token in ids[23:]]
    error = distance(torch.cat([block, *steps]), exact)
    assert error <= bound


@pytest.fixture
def float_level() -> Iterator[None]:
    """The best level whose attention multiplies in float32: the tightest bound."""
    with isa_level([name for name in isa_levels() if name != "avx512_bf16"][-1]):
        yield


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_logits_match_the_float64_model(formats: Formats, level: str) -> None:
    check({}, formats, BFLOAT16_NOISE if level == "avx512_bf16" else ARITHMETIC_NOISE)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("formats", [FORMATS["int8"], FORMATS["fp8"]], ids=["int8", "fp8"])
@pytest.mark.usefixtures("float_level")
def test_every_architecture_matches_the_float64_model(options: dict[str, Any], formats: Formats) -> None:
    check(options, formats)


@pytest.mark.parametrize(
    "wrong", ["input_layernorm.weight", "v_proj.weight", "mlp.up_proj.weight", "model.norm.weight"]
)
def test_the_bound_is_tighter_than_a_wrong_weight(wrong: str) -> None:
    model, ids, formats = engine_model(), token_ids(40), FORMATS["int8"]
    oracle = Oracle(model, formats)
    exact = oracle.logits(ids)
    bound = oracle.bound(ids, exact)
    name = next(n for n in oracle.weights if n.endswith(wrong))
    oracle.weights[name] = oracle.weights[name].roll(1, -1)
    assert distance(oracle.logits(ids), exact) > bound


def test_fold_mode_is_another_rounding_of_the_same_model() -> None:
    model, ids = engine_model(), token_ids(30)
    exact = Engine(compile(model, "fp8"), 64).logits(ids)
    fold = Engine(compile(model, "fp8-fold"), 64).logits(ids)
    # e4m3(q s) is off by up to 2^-4 of each weight
    assert 0 < distance(fold, exact.double()) < 0.3


@pytest.mark.usefixtures("float_level")
def test_float_linears_run_in_bfloat16() -> None:
    model, ids = engine_model(), token_ids(30)
    oracle = Oracle(model, Formats("int8", "bf16", "float32"))
    oracle._round_activation = lambda x: x  # type: ignore[method-assign]
    for name in list(model.weights):
        if name.endswith("proj.weight"):
            model.weights[name] = model.weights[name].dequantize(torch.bfloat16)  # type: ignore[union-attr]
            oracle.weights[name] = model.weights[name].double()  # type: ignore[union-attr]
    exact = oracle.logits(ids)
    bound = oracle.bound(ids, exact)
    assert bound < 0.05
    assert distance(Engine(compile(model, kv="bf16", query="float32"), 64).logits(ids), exact) <= bound
