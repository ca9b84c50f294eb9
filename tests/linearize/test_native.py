# SPDX-License-Identifier: Apache-2.0
"""Linearized models give the same tokens through the native engine as in transformers.

Weights are bfloat16 numbers, which both hold exactly; what differs is the rounding of float32 arithmetic, and is held
against that of transformers itself, with the same model in float64 as the truth.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewright.linearize import convert, load, save
from tilewright.linearize.hedgehog import HedgehogConfig
from tilewright.linearize.liger import LigerConfig
from tilewright.linearize.native import to_language_model
from tilewright.models import EngineForCausalLM
from tilewright.models.engine import Engine
from tilewright.models.image import compile

VOCABULARY, LAYERS = 61, 3
METHODS: dict[str, Any] = {
    "liger": LigerConfig(window_size=6),
    "liger_hgrn2": LigerConfig("hgrn2", window_size=5, alpha=0.3, beta=0.9),
    "liger_normalized": LigerConfig(window_size=4, normalize=True, gate_logit_normalizer=4.0),
    "liger_pool": LigerConfig("hgrn2", window_size=4, pool=4),
    "liger_random_gate": LigerConfig(window_size=4, gate="random", pool=2),
    "liger_no_gate": LigerConfig(window_size=4, gate="none"),
    "liger_recurrence_alone": LigerConfig(alpha=0.7, beta=0.0),
    "liger_window_alone": LigerConfig(window_size=5, alpha=0.0, beta=1.0),
    "hedgehog": HedgehogConfig(),
    "hedgehog_window": HedgehogConfig(window_size=7),
    "hedgehog_exp_dim": HedgehogConfig(activation="exp_dim", feature_dim=9, bias=True, window_size=3),
    "hedgehog_exp": HedgehogConfig(activation="exp", key_maps="query_heads"),
    "hedgehog_joint": HedgehogConfig(activation="joint_softmax", key_maps="query_heads", window_size=2),
    "hedgehog_elu": HedgehogConfig(feature_map="elu"),
    "hedgehog_relu": HedgehogConfig(feature_map="relu", window_size=4),
}
every_method = pytest.mark.parametrize("kind", METHODS)


def converted(kind: str, layers: Any = "all", **changes: Any) -> Any:
    """A tiny Llama with this attention; every weight is a bfloat16 number."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=LAYERS, max_position_embeddings=128, **(sizes | options | changes)
    )
    torch.manual_seed(11)
    model = LlamaForCausalLM(config).eval()
    model = convert(model, kind.split("_")[0], METHODS[kind], layers=layers, inplace=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "features." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.to(torch.bfloat16))
    return model.requires_grad_(False)


def prompt(count: int = 50, seed: int = 2) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@every_method
def test_logits_are_as_exact_as_in_transformers(kind: str) -> None:
    model, ids = converted(kind), prompt()
    theirs = model(torch.tensor([ids]), use_cache=False).logits[0]
    exact = copy.deepcopy(model).double()(torch.tensor([ids]), use_cache=False).logits[0]
    engine = Engine(to_language_model(model), 64)
    ours = torch.cat([engine.forward([ids[:31]], all_logits=True), *(engine.step(i) for i in ids[31:])])
    assert 0 < distance(ours, exact) <= 2 * distance(theirs, exact)


@every_method
def test_greedy_generation_gives_the_same_tokens(kind: str) -> None:
    model, ids = converted(kind), prompt(20)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=None)[0, 20:]
    engine = Engine(to_language_model(model), 128)
    assert list(engine.generate(ids, max_new_tokens=40, stop_tokens=())) == expected.tolist()
    assert engine.image.has_constant_state


def test_beams_over_the_engine_are_those_of_transformers() -> None:
    model, ids = converted("liger"), torch.tensor([prompt(9), prompt(9, 5)])
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    fast = EngineForCausalLM(to_language_model(model), 64)
    assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("kind", ["liger", "hedgehog_window"])
def test_layers_that_keep_softmax_attention_keep_it(kind: str) -> None:
    model, ids = converted(kind, layers=[0, 2]), prompt(20)
    # Those layers' keys and values are held as bfloat16, in which case the tokens of a tiny model may differ.
    exact = copy.deepcopy(model).double()(torch.tensor([ids]), use_cache=False).logits[0]
    image = compile(to_language_model(model), kv="bf16", query="float32")
    assert not image.has_constant_state
    # 2^-9 for each rounded key and value, of one layer in three.
    assert distance(Engine(image, 64).logits(ids), exact) < 2.0**-8


@pytest.mark.parametrize("kind", ["liger", "hedgehog_window"])
def test_a_saved_folder_runs_on_the_engine(kind: str, tmp_path: Any) -> None:
    model, ids = converted(kind, tie_word_embeddings=False), prompt(9)
    save(model, tmp_path / "model", source="tiny")
    loaded = to_language_model(load(tmp_path / "model"))
    assert loaded.source == "tiny"
    assert torch.equal(Engine(loaded, 64).logits(ids), Engine(to_language_model(model), 64).logits(ids))


def test_what_has_no_native_form_is_refused() -> None:
    from transformers import LlamaForCausalLM

    model = converted("liger")
    METHODS["liger_gsa"], METHODS["hedgehog_performer"] = LigerConfig("gsa"), HedgehogConfig(feature_map="performer")
    try:
        with pytest.raises(ValueError, match=r"'gsa' .* has no native form"):
            to_language_model(converted("liger_gsa"))
        with pytest.raises(ValueError, match="feature_map 'performer' has no native form"):
            to_language_model(converted("hedgehog_performer"))
    finally:
        del METHODS["liger_gsa"], METHODS["hedgehog_performer"]
    with pytest.raises(ValueError, match="LlamaForCausalLM is not linearized"):
        to_language_model(LlamaForCausalLM(model.config))
