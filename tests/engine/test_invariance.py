# SPDX-License-Identifier: Apache-2.0
"""A token's logits are the same bits in any block, batch and number of threads."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from engine_models import engine_model, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.models.engine import Engine
from tilewright.models.image import ModelImage, compile
from tilewright.testing import isa_level

LENGTH = 330  # past the first chunk of keys
KINDS = (("int8", "int4"), ("fp8", "int4"), ("int8", "bf16"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def image(request: pytest.FixtureRequest) -> ModelImage:
    return compile(engine_model(), *request.param)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return token_ids(LENGTH)


@pytest.fixture(scope="module")
def whole(image: ModelImage, ids: list[int]) -> torch.Tensor:
    torch.set_num_threads(1)
    return Engine(image, LENGTH).logits(ids)


def in_pieces(engine: Engine, ids: list[int], cuts: list[int]) -> torch.Tensor:
    engine.reset()
    edges = [0, *cuts, len(ids)]
    return torch.cat([engine.forward([ids[a:b]], all_logits=True) for a, b in itertools.pairwise(edges)])


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, LENGTH), max_size=12).map(sorted), threads=st.sampled_from([1, 2, 3]))
def test_any_split_of_a_text_gives_the_same_bits(
    image: ModelImage, ids: list[int], whole: torch.Tensor, cuts: list[int], threads: int
) -> None:
    torch.set_num_threads(threads)
    assert torch.equal(in_pieces(Engine(image, LENGTH), ids, cuts), whole)


def test_decoding_gives_the_bits_of_prefill(image: ModelImage, ids: list[int], level: str) -> None:
    del level
    torch.set_num_threads(1)
    reference = Engine(image, LENGTH).logits(ids)
    engine = Engine(image, LENGTH)
    assert torch.equal(in_pieces(engine, ids, list(range(250, LENGTH))), reference)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(
    image: ModelImage, ids: list[int], whole: torch.Tensor, threads: int
) -> None:
    torch.set_num_threads(threads)
    engine = Engine(image, LENGTH)
    assert torch.equal(engine.logits(ids), whole)
    assert torch.equal(in_pieces(engine, ids, [300, 301, 302]), whole)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_neighbours_in_a_batch_change_nothing(
    image: ModelImage, ids: list[int], whole: torch.Tensor, data: st.DataObject
) -> None:
    torch.set_num_threads(2)
    engine = Engine(image, LENGTH, batch=3)
    others = [token_ids(LENGTH, seed) for seed in (11, 12)]
    done, results = [0, 0, 0], []
    while done[1] < LENGTH:
        sizes = [data.draw(st.integers(0, LENGTH - held)) for held in done]
        texts = [others[0], ids, others[1]]
        lists = [text[at : at + size] for text, at, size in zip(texts, done, sizes, strict=True)]
        logits = engine.forward(lists, all_logits=True)
        results.append(logits[sizes[0] : sizes[0] + sizes[1]])
        done = [held + size for held, size in zip(done, sizes, strict=True)]
        if len(results) > 6:
            results.append(engine.forward([[], ids[done[1] :], []], all_logits=True))
            break
    assert torch.equal(torch.cat(results), whole)


def test_last_logits_are_those_of_all_logits(image: ModelImage, ids: list[int], whole: torch.Tensor) -> None:
    engine = Engine(image, LENGTH, batch=4)
    last = engine.forward([ids[:7], [], ids, ids[:1]])
    assert torch.equal(last[0], whole[6])
    assert torch.equal(last[1], torch.zeros_like(last[1]))
    assert torch.equal(last[2], whole[-1])
    assert torch.equal(last[3], whole[0])


def test_int8_levels_agree_where_attention_is_one_key(image: ModelImage, level: str) -> None:
    """One token attends to itself with weight 1; the rest is exact integers and one order of float operations."""
    if image.act != "int8" or level == "avx512_bf16":
        pytest.skip("FP8 sums are ordered by the level's vector width, and the last level rounds values to bfloat16")
    logits = Engine(image, 8).logits([5])
    with isa_level("generic"):
        assert torch.equal(Engine(image, 8).logits([5]), logits)


def test_two_callers_at_once(image: ModelImage, ids: list[int], whole: torch.Tensor) -> None:
    torch.set_num_threads(2)
    results: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        results[index] = in_pieces(Engine(image, LENGTH), ids, [100, 200, 201, 202])

    callers = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(results[i], whole) for i in range(3))


def test_the_team_is_rebuilt_in_a_child_process(image: ModelImage, ids: list[int], whole: torch.Tensor) -> None:
    torch.set_num_threads(2)
    engine = Engine(image, LENGTH)
    engine.logits(ids)
    expected = whole[-1].tolist()
    child = os.fork()
    if child == 0:
        # small tensors only: torch's own thread pool does not survive a fork
        engine.reset()
        engine.forward([ids[:-1]])
        os._exit(0 if engine.step(ids[-1])[0].tolist() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
