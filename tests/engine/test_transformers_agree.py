# SPDX-License-Identifier: Apache-2.0
"""The operator-by-operator path of to_transformers gives the engine's bits, hence its tokens.

No tolerance: both run the same kernels on the same inputs in the same order, and each operator's result does not depend
on how tokens are batched.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import engine_model, token_ids

from tilewright.models import Int4KVCache, load, to_transformers
from tilewright.models.engine import Engine
from tilewright.models.hf_names import cache_name
from tilewright.models.image import compile

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "int4 head": {"head": "int4"},
    "bf16 head of its own": {"head": "bf16", "tie_word_embeddings": False},
    "minima, wide groups": {"symmetric": False, "group": 96},
    "key scales": {"key_scale": True},
    "window, one KV head": {"model_type": "mistral", "sliding_window": 5, "num_key_value_heads": 1},
    "window from qwen2, biases": {"model_type": "qwen2", "sliding_window": 7, "qkv_bias": True},
    "input biases only": {"qkv_bias": True, "mlp_bias": True},
}
GREEDY = {"do_sample": False, "eos_token_id": None}


def both(model: Any, **options: Any) -> tuple[Any, Engine]:
    kv = {4: "int4", 16: "bf16"}[options["kv_bits"]]
    image = compile(model, options["act"], kv, options.get("query", "fp8"), scale_group=options.get("scale_group"))
    return to_transformers(model, **options), Engine(image, 64)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{"act": "int8", "kv_bits": 4}, {"act": "fp8", "kv_bits": 16}], ids=str)
def test_logits_are_the_engines_bits(kind: str, options: dict[str, Any]) -> None:
    model = engine_model(**MODELS[kind])
    theirs, engine = both(model, **options)
    ids = token_ids(21)
    with torch.no_grad():
        assert torch.equal(theirs(torch.tensor([ids])).logits[0], engine.logits(ids))


@pytest.mark.parametrize(
    "options",
    [
        {"act": "fp8", "kv_bits": 4},
        {"act": "fp8-fold", "kv_bits": 4, "query": "float32"},
        {"act": "int8", "kv_bits": 4, "scale_group": 0},
        {"act": "int8", "kv_bits": 16, "scale_group": 32, "query": "float32"},
    ],
    ids=str,
)
def test_options_mean_the_same(options: dict[str, Any], level: str) -> None:
    del level
    theirs, engine = both(engine_model(), **options)
    ids = token_ids(21)
    with torch.no_grad():
        assert torch.equal(theirs(torch.tensor([ids])).logits[0], engine.logits(ids))


def test_defaults_are_the_engines() -> None:
    model = engine_model()
    model.settings.update({"activations": "fp8", "mode": "fold", "kv_bits": 4})
    ids = token_ids(21)
    with torch.no_grad():
        got = to_transformers(model)(torch.tensor([ids])).logits[0]
    assert torch.equal(got, Engine(model, 64).logits(ids))
    assert not torch.equal(got, Engine(model, 64, act="int8").logits(ids))


@pytest.mark.parametrize("kind", ["llama", "key scales", "window, one KV head"])
@pytest.mark.parametrize("cached", ["stored", "float", "none"])
def test_generate_gives_the_engines_tokens(kind: str, cached: str) -> None:
    """With an INT4 cache that holds codes, with transformers' own float cache, and without a cache."""
    model = engine_model(**MODELS[kind])
    theirs, engine = both(model, act="int8", kv_bits=4)
    prompt = token_ids(9)
    arguments: dict[str, Any] = {
        "stored": {cache_name(): Int4KVCache(model)},
        "float": {},
        "none": {"use_cache": False},
    }[cached]
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, **GREEDY, **arguments)
    assert out[0, 9:].tolist() == list(engine.generate(prompt, max_new_tokens=12, stop_tokens=()))


@pytest.mark.parametrize("stored", [True, False])
def test_a_padded_batch_gives_each_prompts_own_tokens(stored: bool) -> None:
    model = engine_model(model_type="mistral", sliding_window=5)
    theirs, engine = both(model, act="fp8", kv_bits=4)
    prompts = [token_ids(count, seed=count) for count in (3, 8, 1)]
    ids = torch.tensor([[0] * (8 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (8 - len(p)) + [1] * len(p) for p in prompts])
    cache = {cache_name(): Int4KVCache(model)} if stored else {}
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=10, **GREEDY, **cache)
    for row, prompt in zip(out, prompts, strict=True):
        assert row[8:].tolist() == list(engine.generate(prompt, max_new_tokens=10, stop_tokens=()))


def test_masks_that_cannot_be_followed_are_refused() -> None:
    theirs = to_transformers(engine_model())
    ids = torch.tensor([token_ids(4)])
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 1, 4, 4\]"):
        theirs(ids, attention_mask=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="position_ids fall"):
        theirs(ids, position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(RuntimeError, match=r"rows 0 \.\. 100"):
        theirs(torch.tensor([[101]]))


def test_transformers_own_attention_can_be_chosen() -> None:
    """It reads the same cache; only queries stay as they are, so a float32 query gives the same up to summation."""
    model = engine_model(key_scale=True)
    ids = torch.tensor([token_ids(9)])
    theirs = to_transformers(model, act="int8", kv_bits=4, query="float32")
    first = theirs.model.layers[0].self_attn
    outputs = []
    for name in ("tilewright", "sdpa"):
        theirs.set_attn_implementation(name)
        taken: list[torch.Tensor] = []
        hook = first.o_proj.register_forward_pre_hook(lambda _module, inputs, to=taken: to.append(inputs[0]))
        with torch.no_grad():
            theirs(ids, **{cache_name(): Int4KVCache(model)})
        hook.remove()
        outputs += taken
    # the operator's products may be of bfloat16 pairs, relative 2^-8 each; see csrc/ops/int4_fp8_attention
    assert (outputs[0] - outputs[1]).norm() <= 2**-8 * outputs[1].norm()


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Any) -> Any:
    return load(smollm2_gguf)


@pytest.mark.model
@pytest.mark.parametrize("act", ["int8", "fp8"])
def test_smollm2_gives_the_engines_tokens(smollm2: Any, act: str) -> None:
    theirs, engine = both(smollm2, act=act, kv_bits=4)
    for text in ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a house by the sea,"):
        ids = smollm2.tokenizer(text, return_tensors="pt").input_ids
        prompt = ids[0].tolist()
        with torch.no_grad():
            assert torch.equal(theirs(ids).logits[0], engine.logits(prompt))
        cache = Int4KVCache(smollm2)
        out = theirs.generate(ids, max_new_tokens=24, **{cache_name(): cache}, **GREEDY)
        assert out[0, len(prompt) :].tolist() == list(engine.generate(prompt, max_new_tokens=24, stop_tokens=()))


@pytest.mark.model
def test_smollm2_holds_no_float_matrix(smollm2: Any) -> None:
    theirs = to_transformers(smollm2)
    assert all(p.dim() == 1 for p in theirs.parameters())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in theirs.state_dict().values()}
    # the packed forms pad rows to blocks of 16 and regions to cache lines
    assert sum(storages.values()) < 1.05 * smollm2.nbytes
