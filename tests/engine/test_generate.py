# SPDX-License-Identifier: Apache-2.0
"""Generation: batches, seeds, stop tokens, reuse of a conversation, limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_models import engine_model, token_ids

from tilewright.models import LanguageModel, load
from tilewright.models.engine import BLOCK_TOKENS, Engine, SamplingConfig
from tilewright.models.image import ModelImage, compile

PROMPTS = [token_ids(9, 1), token_ids(1, 2), token_ids(23, 3)]
DRAWN = SamplingConfig(temperature=1.3, top_k=20, top_p=0.95, seed=12, max_new_tokens=15)


@pytest.fixture(scope="module")
def image() -> ModelImage:
    return compile(engine_model())


def test_greedy_takes_the_largest_logit_each_time(image: ModelImage) -> None:
    ids = list(PROMPTS[0])
    generated = list(Engine(image, 64).generate(ids, max_new_tokens=10, stop_tokens=()))
    for token in generated:
        logits = Engine(image, 64).logits(ids)
        assert token == int(logits[-1].argmax())
        ids.append(token)


@pytest.mark.parametrize("sampling", [SamplingConfig(max_new_tokens=15), DRAWN], ids=["greedy", "drawn"])
def test_a_batch_gives_what_each_prompt_gives_alone(image: ModelImage, sampling: SamplingConfig) -> None:
    alone = [list(Engine(image, 64).generate(prompt, sampling)) for prompt in PROMPTS]
    steps = list(Engine(image, 64, batch=3).generate_batch(PROMPTS, sampling))
    together = [[token for token in column if token is not None] for column in zip(*steps, strict=True)]
    assert together == alone


def test_a_seed_fixes_the_text_and_another_changes_it(image: ModelImage) -> None:
    engine = Engine(image, 64)
    first = list(engine.generate(PROMPTS[0], DRAWN, stop_tokens=()))
    assert list(engine.generate(PROMPTS[0], DRAWN, stop_tokens=())) == first
    other = SamplingConfig(temperature=1.3, top_k=20, top_p=0.95, seed=13, max_new_tokens=15)
    assert list(engine.generate(PROMPTS[0], other, stop_tokens=())) != first


def test_a_stop_token_is_given_and_ends_the_text(image: ModelImage) -> None:
    engine = Engine(image, 64)
    free = list(engine.generate(PROMPTS[0], max_new_tokens=12, stop_tokens=()))
    stop = free[4]
    ended = list(engine.generate(PROMPTS[0], max_new_tokens=12, stop_tokens={stop}))
    assert ended == free[: free.index(stop) + 1]


def test_ended_sequences_of_a_batch_stay_silent(image: ModelImage) -> None:
    alone = [list(Engine(image, 64).generate(p, max_new_tokens=12, stop_tokens=())) for p in PROMPTS]
    stop = alone[0][2]
    steps = list(Engine(image, 64, batch=3).generate_batch(PROMPTS, max_new_tokens=12, stop_tokens={stop}))
    for column, free in zip(zip(*steps, strict=True), alone, strict=True):
        count = free.index(stop) + 1 if stop in free else 12
        assert list(column) == free[:count] + [None] * (len(steps) - count)


def test_a_conversation_may_go_on_from_what_is_held(image: ModelImage) -> None:
    engine = Engine(image, 128)
    answer = list(engine.generate(PROMPTS[2], max_new_tokens=6, stop_tokens=()))
    longer = PROMPTS[2] + answer + token_ids(7, 9)
    fresh = list(Engine(image, 128).generate(longer, max_new_tokens=6, stop_tokens=()))
    assert list(engine.generate(longer, max_new_tokens=6, stop_tokens=(), reuse=True)) == fresh
    assert list(engine.generate(PROMPTS[2], max_new_tokens=6, stop_tokens=(), reuse=True)) == answer
    assert list(engine.generate(PROMPTS[0], max_new_tokens=3, reuse=True)) == list(
        Engine(image, 128).generate(PROMPTS[0], max_new_tokens=3)
    )


def test_prompts_longer_than_a_block(image: ModelImage) -> None:
    long, short = token_ids(BLOCK_TOKENS + 100, 4), token_ids(3, 5)
    engine = Engine(image, 1000, batch=2)
    logits = engine.prefill([long, short])
    assert torch.equal(logits[0], Engine(image, 1000).logits(long)[-1])
    assert torch.equal(logits[1], Engine(image, 1000).logits(short)[-1])
    assert engine.lengths == [len(long), 3]


def test_limits_are_named(image: ModelImage) -> None:
    engine = Engine(image, 20)
    assert len(list(engine.generate(token_ids(15), max_new_tokens=6, stop_tokens=()))) == 6
    with pytest.raises(
        ValueError, match=r"21 of prompt and new tokens exceed max_length = 20; shorten .* limit is 1024"
    ):
        next(engine.generate(token_ids(15), max_new_tokens=7))
    assert len(list(engine.generate(token_ids(15), stop_tokens=()))) == 6
    with pytest.raises(ValueError, match="a prompt is empty"):
        next(engine.generate([]))
    with pytest.raises(ValueError, match="use generate_batch"):
        next(Engine(image, 20, batch=2).generate([1]))
    with pytest.raises(ValueError, match="1 prompts, this engine has batch = 2"):
        Engine(image, 20, batch=2).prefill([[1]])
    with pytest.raises(ValueError, match=r"needed 1 \.\. 1024, the model's limit"):
        Engine(image, 1025)
    with pytest.raises(ValueError, match="pass them to compile"):
        Engine(image, 20, act="fp8")
    with pytest.raises(ValueError, match="kv_bits = 8"):
        Engine(engine_model(), 20, kv_bits=8)


def test_formats_follow_the_quantizers_settings() -> None:
    model = engine_model()
    assert (Engine(model, 8).image.act, Engine(model, 8).image.kv) == ("int8", "bf16")
    model.settings.update(activations="fp8", mode="fold", kv_bits=4)
    assert (Engine(model, 8).image.act, Engine(model, 8).image.kv) == ("fp8-fold", "int4")
    assert Engine(model, 8, act="int8", kv_bits=16).image.act == "int8"


def test_releasing_leaves_no_second_copy() -> None:
    model, kept = engine_model(), engine_model()
    expected = Engine(kept, 32).logits(PROMPTS[0])
    engine = Engine(model, 32, release=True)
    assert model.weights == {}
    assert len(kept.weights) > 0
    assert torch.equal(engine.logits(PROMPTS[0]), expected)


def test_memory_is_what_the_formats_need(image: ModelImage) -> None:
    packed = sum(w.nbytes for w in engine_model().weights.values() if not isinstance(w, torch.Tensor))
    assert image.nbytes < 1.2 * packed
    engine = Engine(image, 64, batch=2)
    config = image.config
    rows = 2 * 2 * 64 * config.num_key_value_heads * config.num_hidden_layers
    assert engine.state_nbytes == pytest.approx(rows * (config.head_dim / 2 + 4), abs=1024)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> LanguageModel:
    return load(smollm2_gguf)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("act", ["int8", "fp8"])
def test_the_real_model_answers(smollm2: LanguageModel, act: str) -> None:
    text = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name the capital of France in one sentence."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = smollm2.tokenizer(text, add_special_tokens=False)["input_ids"]
    engine = Engine(smollm2, 128, act=act)  # type: ignore[arg-type]
    answer = list(engine.generate(ids, max_new_tokens=24))
    assert "Paris" in smollm2.tokenizer.decode(answer)
    batch = Engine(engine.image, 128, batch=2)
    assert [
        step[1] for step in batch.generate_batch([ids[:20], ids], max_new_tokens=24) if step[1] is not None
    ] == answer
