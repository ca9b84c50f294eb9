# SPDX-License-Identifier: Apache-2.0
"""EngineForCausalLM: transformers' generate() over the engine gives the engine's own tokens."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_weights, tiny_config, write_gguf

from tilewright.models import EngineForCausalLM, LanguageModel, load
from tilewright.models.engine import Engine
from tilewright.models.hf_names import cache_name

PROMPT = [5, 9, 17, 33, 65, 8, 2, 40]
SHORT = [7, 70, 3]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> LanguageModel:
    config = tiny_config()
    return load(write_gguf(tmp_path_factory.mktemp("g") / "m.gguf", config, random_weights(config)))


@pytest.fixture(scope="module")
def model(loaded) -> EngineForCausalLM:
    return EngineForCausalLM(loaded, 64, act="int8", kv_bits=4)


def generate(model, prompts, **options) -> list[list[int]]:
    """Left-padded batch; what follows the prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    arguments = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | options
    return model.generate(ids, attention_mask=mask, **arguments)[:, width:].tolist()


@pytest.mark.parametrize("kv_bits", [4, 16])
@pytest.mark.parametrize("act", ["int8", "fp8"])
def test_greedy_tokens_are_the_engines(loaded, act, kv_bits):
    engine = Engine(loaded, 64, act=act, kv_bits=kv_bits)
    expected = list(engine.generate(PROMPT, max_new_tokens=10, stop_tokens=()))
    assert generate(EngineForCausalLM(loaded, 64, act=act, kv_bits=kv_bits), [PROMPT]) == [expected]


def test_padded_batches_give_what_each_prompt_gives_alone(model):
    assert generate(model, [PROMPT, SHORT]) == [*generate(model, [PROMPT]), *generate(model, [SHORT])]


def test_all_logits_equal_those_of_steps(model):
    ids = torch.tensor([PROMPT])
    whole = model(ids).logits[0]
    cache = model.new_cache(1)
    for index in range(len(PROMPT)):
        step = model(ids[:, index : index + 1], **{cache_name(): cache}, logits_to_keep=1).logits[0, 0]
        assert torch.equal(step, whole[index])


def test_logits_at_padding_are_zero(model):
    ids = torch.tensor([[0, 0, *SHORT], PROMPT[:5]])
    logits = model(ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1] * 5])).logits
    assert (logits[0, :2] == 0).all()
    assert torch.equal(logits[0, 2:], model(torch.tensor([SHORT])).logits[0])
    assert torch.equal(logits[1], model(torch.tensor([PROMPT[:5]])).logits[0])


def test_beams_are_those_of_a_search_without_a_cache(model):
    """use_cache=False recomputes every hypothesis from its tokens: the oracle of reordering."""
    options = {"num_beams": 3, "num_return_sequences": 3}
    ids = torch.tensor([PROMPT])
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(ids, **arguments, **options)
    without = model.generate(ids, use_cache=False, **arguments, **options)
    assert torch.equal(with_cache, without)


def test_reordered_rows_continue_as_if_written_so(model):
    cache = model.new_cache(2)
    rows = torch.tensor([PROMPT[:4], [5, 9, 80, 81]])
    model(rows, **{cache_name(): cache})
    cache.reorder_cache(torch.tensor([1, 1]))
    following = model(torch.tensor([[3], [4]]), **{cache_name(): cache}).logits[:, 0]
    for row, token in enumerate((3, 4)):
        alone = model(torch.tensor([[5, 9, 80, 81, token]])).logits[0, -1]
        assert torch.equal(following[row], alone)


def test_cropped_cache_continues_from_there(model):
    cache = model.new_cache(1)
    ids = torch.tensor([PROMPT])
    whole = model(ids, **{cache_name(): cache}).logits
    cache.crop(-3)
    assert cache.get_seq_length() == len(PROMPT) - 3
    assert torch.equal(model(ids[:, -3:], **{cache_name(): cache}).logits, whole[:, -3:])


def test_memory_of_a_dropped_cache_is_used_again(loaded):
    model = EngineForCausalLM(loaded, 64)
    first, second = model.new_cache(1), model.new_cache(1)
    assert first.engine is not second.engine
    engine = first.engine
    del first
    assert model.new_cache(1).engine is engine
    assert generate(model, [PROMPT]) == generate(model, [PROMPT])


def test_sampling_with_a_seed_repeats(model):
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(generate(model, [PROMPT], do_sample=True, temperature=1.5, top_k=20))
    assert texts[0] == texts[1]
    assert texts[0] != generate(model, [PROMPT])


def test_context_overflow_is_described(model):
    with pytest.raises((ValueError, RuntimeError), match="64"):
        generate(model, [PROMPT], max_new_tokens=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 1, 64)}, "inputs_embeds"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"labels": torch.tensor([[1]])}, "labels"),
        ({"attention_mask": torch.ones(1, 1, 1, 1)}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask"),
    ],
)
def test_what_the_engine_cannot_follow_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([PROMPT[:3]]), **arguments)


def test_compiled_weights_are_not_saved(model, tmp_path):
    with pytest.raises(TypeError, match=r"tilewright\.models\.save"):
        model.save_pretrained(tmp_path)
