# SPDX-License-Identifier: Apache-2.0
"""Damaged images, wrong states and wrong arguments give errors, never a crash."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from engine_models import VOCABULARY, engine_model, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright.models.engine import Engine
from tilewright.models.image import ModelImage, compile, seal
from tilewright.ops import engine as ops

LENGTH = 16
HEADER_WORDS = 8


@pytest.fixture(scope="module")
def image() -> ModelImage:
    return compile(engine_model(key_scale=True, model_type="qwen2", qkv_bias=True))


def forward(image: ModelImage, state: Tensor | None = None, ids: list[int] | None = None) -> Tensor:
    if state is None:
        state = ops.engine_state(image.program, image.weights, 1, LENGTH)
    tokens = torch.tensor(token_ids(5) if ids is None else ids)
    return ops.engine_forward(image.program, image.weights, state, tokens, torch.tensor([0, len(tokens)]))


def survives(run: Callable[[], object]) -> None:
    """The run may fail with an error of ours; anything else fails the test (or kills it)."""
    with contextlib.suppress(RuntimeError):
        run()


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_program_is_an_error_or_a_program(image: ModelImage, data: st.DataObject) -> None:
    """The checksum is made right again, so that the checks behind it are what is tested."""
    program = image.program.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(program) - 1))
        old = int(program[at])
        program[at] = data.draw(
            st.one_of(
                st.integers(-3, 70),
                st.integers(-(2**63), 2**63 - 1),
                st.sampled_from([old - 1, old + 1, old + 64, 2 * old, -old]).filter(lambda v: -(2**63) <= v < 2**63),
                st.integers(0, 63).map(functools.partial(_flipped, old)),
            )
        )
    damaged = dataclasses.replace(image, program=seal(program))
    survives(lambda: forward(damaged))


def test_a_slot_far_beyond_the_others_is_an_error_before_memory_is_taken_for_it(image: ModelImage) -> None:
    first_slot = 8
    for slot in (0, 2):
        program = image.program.clone()
        program[first_slot + 2 * slot] = 1_263_825_643
        with pytest.raises(RuntimeError, match=r"slots reach to float \d+ of a token, but need \d+ side by side"):
            forward(dataclasses.replace(image, program=seal(program)))


def _flipped(word: int, bit: int) -> int:
    return int(torch.tensor(word) ^ (torch.tensor(1) << bit))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_of_the_program_is_found(image: ModelImage, data: st.DataObject) -> None:
    program = image.program.clone()
    at = data.draw(st.integers(0, len(program) - 1))
    program[at] = _flipped(int(program[at]), data.draw(st.integers(0, 63)))
    with pytest.raises(RuntimeError, match="engine:"):
        forward(dataclasses.replace(image, program=program))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_weights_are_an_error_or_other_logits(image: ModelImage, data: st.DataObject) -> None:
    weights = ops.engine_arena(image.nbytes)
    weights.copy_(image.weights)
    headers = (weights[:-8:64].view(-1) == ord("T")).nonzero().flatten() * 64
    for _ in range(data.draw(st.integers(1, 4))):
        inside = st.sampled_from(headers.tolist()).flatmap(lambda at: st.integers(at, at + 63))
        at = data.draw(st.one_of(st.integers(0, image.nbytes - 1), inside))
        weights[at] = data.draw(st.integers(0, 255))
    survives(lambda: forward(dataclasses.replace(image, weights=weights)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_state_is_an_error_or_other_logits(image: ModelImage, data: st.DataObject) -> None:
    state = ops.engine_state(image.program, image.weights, 1, LENGTH)
    state[128:] = 0
    forward(image, state)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 127), st.integers(0, state.numel() - 1)))
        state[at] = data.draw(st.integers(0, 255))
    survives(lambda: forward(image, state, [1]))


@pytest.mark.parametrize("words", [0, 1, HEADER_WORDS - 1, HEADER_WORDS, 40])
def test_a_truncated_program_is_an_error(image: ModelImage, words: int) -> None:
    with pytest.raises(RuntimeError, match="engine"):
        forward(dataclasses.replace(image, program=image.program[:words].clone()))


def test_arenas_must_belong_together(image: ModelImage) -> None:
    other = compile(engine_model(seed=5, num_hidden_layers=1))
    with pytest.raises(RuntimeError, match="pass the weights compiled together"):
        forward(dataclasses.replace(image, weights=other.weights))
    state = ops.engine_state(other.program, other.weights, 1, LENGTH)
    with pytest.raises(RuntimeError, match="state belongs to another program"):
        forward(image, state)
    with pytest.raises(RuntimeError, match="magic"):
        forward(image, torch.zeros(4096, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="fewer than the 64"):
        forward(image, torch.zeros(10, dtype=torch.uint8))
    good = ops.engine_state(image.program, image.weights, 1, LENGTH)
    with pytest.raises(RuntimeError, match="its header states"):
        forward(image, good[:-64])
    with pytest.raises(RuntimeError, match="multiple of 64"):
        forward(dataclasses.replace(image, weights=torch.cat((image.weights[:1], image.weights))[1:]))


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**40])
def test_a_token_outside_the_vocabulary_is_an_error(image: ModelImage, token: int) -> None:
    with pytest.raises(RuntimeError, match=rf"tokens\[1\] is {token}, the vocabulary has ids 0\.\.{VOCABULARY - 1}"):
        forward(image, ids=[1, token])


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3], "runs from 0 to 3"),
        ([1, 5], "runs from 1 to 5"),
        ([0, 2, 5], "describes 2 sequences, the state holds 1"),
        ([5], "describes 0 sequences"),
        ([], "cu_seqlens is empty"),
    ],
)
def test_wrong_offsets_are_an_error(image: ModelImage, offsets: list[int], message: str) -> None:
    state = ops.engine_state(image.program, image.weights, 1, LENGTH)
    with pytest.raises(RuntimeError, match=message):
        ops.engine_forward(
            image.program, image.weights, state, torch.tensor(token_ids(5)), torch.tensor(offsets, dtype=torch.int64)
        )


@pytest.mark.parametrize("offsets", [[0, 4, 2, 5], [0, -1, 2, 5], [0, 2**62, 3, 5], [0, 6, 6, 5]])
def test_falling_offsets_are_an_error(image: ModelImage, offsets: list[int]) -> None:
    state = ops.engine_state(image.program, image.weights, 3, LENGTH)
    with pytest.raises(RuntimeError, match="never fall"):
        ops.engine_forward(image.program, image.weights, state, torch.tensor(token_ids(5)), torch.tensor(offsets))


def test_too_long_a_sequence_is_an_error_and_changes_nothing(image: ModelImage) -> None:
    engine = Engine(image, LENGTH)
    engine.prefill(token_ids(10))
    with pytest.raises(RuntimeError, match="holds 10 tokens and 7 more exceed the state's max_length 16"):
        engine.forward([token_ids(7)])
    assert engine.lengths == [10]
    with pytest.raises(ValueError, match=r"10 tokens held and 7 of prompt exceed max_length = 16"):
        engine.prefill(token_ids(7))
    engine.prefill(token_ids(6))
    assert engine.lengths == [LENGTH]


@pytest.mark.parametrize("lengths", [[-1], [11], [3, 3], []])
def test_truncating_to_what_is_not_held_is_an_error(image: ModelImage, lengths: list[int]) -> None:
    engine = Engine(image, LENGTH)
    engine.prefill(token_ids(10))
    with pytest.raises(RuntimeError, match="engine_truncate_"):
        engine.truncate(lengths)
    assert engine.lengths == [10]


@pytest.mark.parametrize(("sequences", "length"), [(0, 4), (-1, 4), (1, 0), (2**31, 4), (2**30, 2**30)])
def test_impossible_states_are_an_error(image: ModelImage, sequences: int, length: int) -> None:
    with pytest.raises(RuntimeError, match="engine_state"):
        ops.engine_state(image.program, image.weights, sequences, length)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.down_proj.weight"])
def test_weights_that_are_not_finite_end_in_a_clear_error(name: str) -> None:
    model = engine_model()
    weight = model.weights[name]
    (weight if isinstance(weight, Tensor) else weight.scales)[0] = torch.nan
    engine = Engine(compile(model), LENGTH)
    assert engine.prefill(token_ids(4)).isnan().any()
    with pytest.raises(RuntimeError, match="logits hold NaN"):
        next(engine.generate(token_ids(4)))


def test_tensors_of_another_kind_are_an_error(image: ModelImage) -> None:
    state = ops.engine_state(image.program, image.weights, 1, LENGTH)
    tokens, offsets = torch.tensor([1, 2]), torch.tensor([0, 2])
    good = (image.program, image.weights, state, tokens, offsets)
    wrong = (image.program.int(), image.weights.float(), state.float(), tokens.float(), offsets.float())
    for index, tensor in enumerate(wrong):
        arguments = [*good[:index], tensor, *good[index + 1 :]]
        with pytest.raises(RuntimeError, match="dtype"):
            ops.engine_forward(*arguments)
    assert torch.equal(
        ops.engine_forward(image.program, image.weights, state, tokens.int(), offsets.int()), forward(image, ids=[1, 2])
    )


def test_compile_refuses_unknown_words() -> None:
    with pytest.raises(ValueError, match="act = 'int2'"):
        compile(engine_model(), "int2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of the weights' groups"):
        compile(engine_model(), scale_group=48)
    with pytest.raises(ValueError, match="one scale a token"):
        compile(engine_model(), "fp8", scale_group=64)
    with pytest.raises(RuntimeError, match="fold mode needs symmetric weights"):
        Engine(compile(engine_model(symmetric=False), "fp8-fold"), LENGTH)
