# SPDX-License-Identifier: Apache-2.0
"""Layers with linear attention in the engine: exact, the same bits however a text is cut, constant in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from engine_models import engine_model, token_ids
from engine_oracle import Formats, distance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixer_models import HEADS, HEDGEHOG, KV_HEADS, MIXERS, SIZE, MixerOracle, mixer_model

from tilewright.models import save, to_transformers
from tilewright.models.engine import Engine
from tilewright.models.image import ModelImage, compile, seal
from tilewright.models.mixers import HeadMap, LinearMixer, Window
from tilewright.ops import engine as ops

LENGTH = 90  # blocks of 32 tokens and windows several times over
FLOATS = Formats("int8", "bf16", "float32")
every_mixer = pytest.mark.parametrize("kind", MIXERS)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_pieces(engine: Engine, ids: list[int], cuts: list[int]) -> torch.Tensor:
    engine.reset()
    edges = [0, *cuts, len(ids)]
    return torch.cat([engine.forward([ids[a:b]], all_logits=True) for a, b in itertools.pairwise(edges)])


@every_mixer
def test_logits_are_as_exact_as_float32_torch(kind: str, level: str) -> None:
    del level
    model, ids = mixer_model(kind), token_ids(60)
    exact = MixerOracle(model, FLOATS).logits(ids)
    float32 = MixerOracle(model, FLOATS, torch.float32).logits(ids)
    engine = Engine(compile(model, kv="bf16", query="float32"), 64)
    ours = torch.cat([engine.forward([ids[:37]], all_logits=True), *(engine.step(i) for i in ids[37:])])
    assert 0 < distance(ours, exact) <= 2 * distance(float32, exact)


WRONG = {
    "window one less": ("liger", {"window": Window(5)}),
    "gate": ("liger", {"gate": HeadMap("log_sigmoid", factor=1 / 15)}),
    "no gate": ("liger", {"gate": None}),
    "parts of the sum": ("liger", {"window": Window(6, None, 0.51, 0.49)}),
    "maps before the rotation": ("hedgehog", {"after_rotation": False}),
    "no denominator": ("hedgehog", {"normalize": False}),
    "window one more": ("hedgehog_window", {"window": Window(8, "model.layers.1.self_attn.mix")}),
}


@pytest.mark.parametrize(("kind", "change"), WRONG.values(), ids=WRONG)
def test_the_bound_is_tighter_than_a_wrong_mixer(kind: str, change: dict[str, object]) -> None:
    model, ids = mixer_model(kind), token_ids(60)
    exact = MixerOracle(model, FLOATS).logits(ids)
    float32 = MixerOracle(model, FLOATS, torch.float32).logits(ids)
    model.mixers[1] = dataclasses.replace(model.mixers[1], **change)  # type: ignore[arg-type]
    ours = Engine(compile(model, kv="bf16"), 64).logits(ids)
    assert distance(ours, exact) > 2 * distance(float32, exact)


@pytest.mark.parametrize("kind", ["liger", "hedgehog_window"])
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)], ids=str)
def test_low_bit_and_hybrid_models_match_the_float64_model(kind: str, layers: tuple[int, ...]) -> None:
    model, ids, formats = mixer_model(kind, layers, low_bit=True), token_ids(40), Formats("int8", "bf16", "float32")
    oracle = MixerOracle(model, formats)
    exact = oracle.logits(ids)
    bound = oracle.bound(ids, exact)
    assert bound < 0.35, "the oracle is too unsteady to tell anything"
    engine = Engine(compile(model, "int8", "bf16", "float32", scale_group=0), 64)
    assert distance(engine.logits(ids), exact) <= bound


@pytest.mark.parametrize("kind", ["liger", "hedgehog", "hedgehog_window"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, LENGTH), max_size=9).map(sorted), threads=st.sampled_from([1, 2, 3]))
def test_any_split_of_a_text_and_any_threads_give_the_same_bits(kind: str, cuts: list[int], threads: int) -> None:
    image, ids = compile(mixer_model(kind)), token_ids(LENGTH)
    torch.set_num_threads(1)
    whole = Engine(image, LENGTH).logits(ids)
    torch.set_num_threads(threads)
    assert torch.equal(in_pieces(Engine(image, LENGTH), ids, cuts), whole)


@pytest.mark.parametrize("kind", ["liger", "hedgehog_window"])
def test_neighbours_in_a_batch_change_nothing(kind: str) -> None:
    image = compile(mixer_model(kind, (0,)))
    texts = [token_ids(LENGTH, seed) for seed in (1, 11, 12)]
    alone = [Engine(image, LENGTH).logits(text)[-1] for text in texts]
    engine = Engine(image, LENGTH, batch=3)
    engine.forward([texts[0][:40], [], texts[2][:3]])
    engine.forward([texts[0][40:41], texts[1][:70], []])
    last = engine.forward([text[held:] for text, held in zip(texts, engine.lengths, strict=True)])
    assert all(torch.equal(row, one) for row, one in zip(last, alone, strict=True))


@pytest.mark.parametrize("kind", ["liger", "hedgehog", "hedgehog_window"])
def test_the_state_is_of_one_size_at_every_length(kind: str) -> None:
    image = compile(mixer_model(kind))
    assert image.has_constant_state
    long = Engine(image, 2**31 - 1)
    assert long.state_nbytes == Engine(image, 1).state_nbytes
    # What it holds, by the shapes: states, and rings of keys (16 rows at a time) and values.
    mixer = MIXERS[kind]
    features = {"liger": SIZE, "hedgehog": 2 * SIZE, "hedgehog_window": 18}[kind]
    # Query heads share the states of their keys, unless keys have a map for every query head.
    states = HEADS if kind == "hedgehog" else KV_HEADS
    state = states * features * (SIZE + int(mixer.normalize)) * 4
    ring = 0 if mixer.window is None else 2 * (16 + mixer.window.size) * SIZE * 4
    assert long.state_nbytes == 128 + 2 * (-(-state // 64) * 64 + ring)
    hybrid = compile(mixer_model(kind, (1,)))
    assert not hybrid.has_constant_state
    with pytest.raises(ValueError, match=r"max_length = 1025, needed 1 \.\. 1024, the model's limit"):
        Engine(hybrid, 1025)


def test_a_constant_state_goes_on_beyond_the_models_limit() -> None:
    model = mixer_model("liger", max_position_embeddings=16)
    ids = token_ids(40)
    float32 = MixerOracle(model, FLOATS, torch.float32).logits(ids)
    exact = MixerOracle(model, FLOATS).logits(ids)
    ours = Engine(compile(model, kv="bf16"), 10_000).logits(ids)
    assert distance(ours, exact) <= 2 * distance(float32, exact)


def test_tokens_are_not_taken_back_but_forgotten_or_restored() -> None:
    engine, ids = Engine(compile(mixer_model("liger")), 64, batch=2), token_ids(20)
    engine.forward([ids[:10], ids[:4]])
    with pytest.raises(RuntimeError, match=r"lengths\[0\] = 7, but sequence 0 is summed up in a recurrent state of 10"):
        engine.truncate([7, 4])
    with pytest.raises(RuntimeError, match=r"lengths\[1\] = 5, needed 0 .. 4"):
        engine.truncate([0, 5])
    assert engine.lengths == [10, 4]
    before = engine.snapshot()
    first = engine.forward([ids[10:], ids[4:]])
    engine.restore(before)
    assert engine.lengths == [10, 4]
    assert torch.equal(engine.forward([ids[10:], ids[4:]]), first)
    engine.truncate([0, 20])
    again = engine.forward([ids, []])
    assert torch.equal(again[0], first[0])
    with pytest.raises(ValueError, match="another model, max_length or batch"):
        Engine(engine.image, 64).restore(before)


def test_a_conversation_goes_on_from_the_state_or_starts_anew() -> None:
    engine, ids = Engine(compile(mixer_model("liger")), 64), token_ids(12)
    options = {"max_new_tokens": 5, "stop_tokens": ()}
    answer = list(engine.generate(ids, **options))
    # All but the last token given out are held; the next turn continues them.
    turn = [*ids, *answer, 7, 8]
    expected = list(Engine(engine.image, 64).generate(turn, **options))
    assert list(engine.generate(turn, reuse=True, **options)) == expected
    other = [*ids[:6], 9, *ids[7:]]
    assert list(engine.generate(other, reuse=True, **options)) == list(
        Engine(engine.image, 64).generate(other, **options)
    )


def test_batched_generation_gives_each_texts_own_tokens() -> None:
    image, prompts = compile(mixer_model("hedgehog_window")), [token_ids(9), token_ids(23, 5), token_ids(1, 6)]
    together = list(Engine(image, 64, batch=3).generate_batch(prompts, max_new_tokens=6, stop_tokens=()))
    for s, prompt in enumerate(prompts):
        alone = list(Engine(image, 64).generate(prompt, max_new_tokens=6, stop_tokens=()))
        assert [tokens[s] for tokens in together] == alone


def test_transformers_generate_runs_on_the_engine_and_crops_by_computing_again() -> None:
    from tilewright.models import EngineForCausalLM

    model, ids = mixer_model("liger"), token_ids(9)
    fast = EngineForCausalLM(model, 64)
    options = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    greedy = fast.generate(torch.tensor([ids]), do_sample=False, **options)[0, 9:].tolist()
    assert greedy == list(Engine(fast.image, 64).generate(ids, max_new_tokens=8, stop_tokens=()))
    cache = fast.new_cache(2)
    cache.extend([ids, ids[:6]], 9)
    cache.crop(-4)
    assert cache.engine.lengths == [5, 2]
    last = cache.extend([ids[5:], ids[2:]], 7)
    assert torch.equal(last[0], Engine(fast.image, 64).forward([ids])[0])


@pytest.mark.parametrize("kind", ["liger", "hedgehog_window"])
@pytest.mark.usefixtures("poisoned")
def test_fresh_memory_is_never_read(kind: str) -> None:
    image = compile(mixer_model(kind))
    state = ops.engine_state(image.program, image.weights, 1, 64)
    state[128:] = 255  # NaN in every float
    ids = torch.tensor(token_ids(50))
    logits = ops.engine_forward(image.program, image.weights, state, ids, torch.tensor([0, 50]), True)
    assert torch.equal(logits, Engine(image, 64).logits(ids))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["liger", "hedgehog_window"])
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_program_is_an_error_or_a_program(kind: str, data: st.DataObject) -> None:
    image = compile(mixer_model(kind, (0,)))
    program = image.program.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(program) - 1))
        old = int(program[at])
        near = st.sampled_from([old - 1, old + 1, old + 64, 2 * old, -old]).filter(lambda v: -(2**63) <= v < 2**63)
        program[at] = data.draw(st.one_of(st.integers(-3, 70), st.integers(-(2**63), 2**63 - 1), near))
    with contextlib.suppress(RuntimeError):
        forward(dataclasses.replace(image, program=seal(program)))


def forward(image: ModelImage) -> torch.Tensor:
    state = ops.engine_state(image.program, image.weights, 1, 16)
    return ops.engine_forward(image.program, image.weights, state, torch.tensor(token_ids(9)), torch.tensor([0, 9]))


def test_a_state_must_say_whether_it_is_recurrent() -> None:
    image = compile(mixer_model("liger"))
    state = ops.engine_state(image.program, image.weights, 1, 16)
    state[48] = 0
    with pytest.raises(RuntimeError, match="whether it is recurrent"):
        ops.engine_forward(image.program, image.weights, state, torch.tensor([1]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("phi_q.weight", (3, SIZE, SIZE), r"phi_q.weight has shape \[3, 16, 16\], needed \[4 or 1, 16, n\]"),
        ("phi_k.weight", (HEADS, SIZE, 5), "mapped k has 4 heads of 10 features; the mapped queries have 32"),
    ],
)
def test_parameters_must_fit_the_heads(name: str, shape: tuple[int, ...], message: str) -> None:
    model = mixer_model("hedgehog")
    model.weights["model.layers.1.self_attn." + name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        compile(model)


def test_mixers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="function='cosine', needed one of softmax"):
        HeadMap("cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size=0, needed at least 1"):
        Window(0)
    with pytest.raises(ValueError, match="needs normalize=True"):
        LinearMixer(HeadMap("elu"), HeadMap("elu"), window=Window(4, mix="mix"))
    with pytest.raises(ValueError, match="a gate is computed from keys before their rotation"):
        dataclasses.replace(HEDGEHOG, gate=HeadMap("log_sigmoid"))


def test_what_needs_softmax_attention_says_so(tmp_path: object) -> None:
    model = mixer_model("liger", (1,))
    with pytest.raises(ValueError, match="save: layer 1 has linear attention"):
        save(model, f"{tmp_path}/model")
    with pytest.raises(ValueError, match="to_transformers: layer 1 has linear attention"):
        to_transformers(model)
    engine_model().require_softmax("anything")
