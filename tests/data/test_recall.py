# SPDX-License-Identifier: Apache-2.0
"""Synthetic tasks ask what they say they ask, and give the same tensors for the same seed."""

from __future__ import annotations

import pytest
import torch

from tilewright.data import recall
from tilewright.data.passkey import passkey_bytes, passkey_prompt
from tilewright.data.recall import BLANK, IGNORE, Stream

TASKS = {
    "multi_query_recall": (recall.multi_query_recall, {"length": 40, "pairs": 5, "vocabulary": 32}),
    "recall_at_distance": (
        recall.recall_at_distance,
        {"length": 40, "pairs": 4, "vocabulary": 32, "distance": (8, 20)},
    ),
    "parity": (recall.parity, {"length": 20}),
    "permutation_tracking": (recall.permutation_tracking, {"length": 12, "elements": 4}),
    "piecewise_linear": (recall.piecewise_linear, {"length": 20, "segment": 6}),
    "in_context_regression": (recall.in_context_regression, {"length": 20, "segment": 6}),
    "passkey_bytes": (passkey_bytes, {"length": 200}),
}


@pytest.fixture(params=sorted(TASKS))
def task(request):
    return TASKS[request.param]


def test_a_seed_names_one_batch(task):
    make, settings = task
    first, again, other = (make(3, seed, **settings) for seed in (7, 7, 8))
    for one, two in zip(first, again, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first[0], other[0])


def test_the_global_generator_is_neither_read_nor_moved(task):
    make, settings = task
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(2, 3, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(make(2, 3, **settings)[0], first[0])


def test_an_empty_batch_keeps_its_shape(task):
    make, settings = task
    full, empty = make(2, 0, **settings), make(0, 0, **settings)
    for one, none in zip(full, empty, strict=True):
        assert none.shape == (0, *one.shape[1:])
        assert none.dtype == one.dtype


def test_streams_of_neighbouring_seeds_and_steps_share_no_batch():
    settings = {"length": 30, "pairs": 4, "vocabulary": 32}
    streams = [Stream(recall.multi_query_recall, 2, seed, settings) for seed in range(3)]
    batches = [stream(step)[0] for stream in streams for step in range(3)]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 9


def replay(inputs: list[int], labels: list[int], gap: int, vocabulary: int) -> int:
    """Read a sequence with a dictionary for a memory; every label must follow from it. Returns the queries seen."""
    memory: dict[int, int] = {}
    asked = 0
    for t, token in enumerate(inputs):
        if labels[t] != IGNORE:
            assert labels[t] == memory[token]
            asked += 1
        elif 1 <= token < vocabulary // 2:
            value = inputs[t + 1 + gap]
            assert vocabulary // 2 <= value < vocabulary
            assert all(blank == BLANK for blank in inputs[t + 1 : t + 1 + gap])
            memory[token] = value
    return asked


@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("rewrites", [0, 1, 5])
@pytest.mark.parametrize("queries", [0, 2, 5])
def test_a_dictionary_solves_multi_query_recall(gap, rewrites, queries):
    inputs, labels = recall.multi_query_recall(
        20, 4, length=64, pairs=5, vocabulary=24, queries=queries, gap=gap, rewrites=rewrites
    )
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert replay(row, wanted, gap, 24) == queries
        written = [token for token, label in zip(row, wanted, strict=True) if 1 <= token < 12 and label == IGNORE]
        assert len(written) == 5 + rewrites
        assert len(set(written)) == 5


def test_a_rewrite_changes_the_value():
    inputs, _ = recall.multi_query_recall(200, 0, length=40, pairs=4, vocabulary=10, rewrites=4)
    writes = inputs[:, 1:16:2]
    assert (writes[:, :4] != writes[:, 4:]).all()


def test_multi_query_recall_fills_its_length_exactly():
    inputs, labels = recall.multi_query_recall(3, 0, length=15, pairs=5, vocabulary=16)
    assert (inputs != BLANK).all()
    assert (labels[:, 10:] != IGNORE).all()


@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("distance", [16, 30, (16, 30)])
def test_every_query_has_the_distance_asked(gap, distance):
    inputs, labels = recall.recall_at_distance(30, 5, length=50, pairs=4, vocabulary=24, distance=distance, gap=gap)
    low, high = (distance, distance) if isinstance(distance, int) else distance
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert replay(row, wanted, gap, 24) == 4
        seen = {t - row.index(row[t]) for t, label in enumerate(wanted) if label != IGNORE}
        assert len(seen) == 1
        assert low <= seen.pop() <= high


def test_parity_counts_ones():
    inputs, labels = recall.parity(50, 1, length=33)
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert wanted == [sum(row[: t + 1]) % 2 for t in range(33)]


@pytest.mark.parametrize("moves", ["all", "swaps"])
def test_permutations_compose_from_the_first_to_the_last(moves):
    table = recall.permutations(4).tolist()
    inputs, labels = recall.permutation_tracking(10, 2, length=9, elements=4, moves=moves)
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        state = [0, 1, 2, 3]
        for token, label in zip(row, wanted, strict=True):
            state = [table[token][x] for x in state]
            assert table[label] == state
            assert moves == "all" or sum(a != b for a, b in enumerate(table[token])) == 2


def test_last_only_labels_leave_the_rest_unscored():
    for make, settings in ((recall.parity, {}), (recall.permutation_tracking, {"elements": 3})):
        every, last = (make(4, 3, length=10, every=every, **settings)[1] for every in (True, False))
        assert torch.equal(every[:, -1], last[:, -1])
        assert (last[:, :-1] == IGNORE).all()


def test_each_segment_obeys_one_linear_law_and_segments_differ():
    x, y = recall.piecewise_linear(2, 0, length=45, segment=20, inputs=3, outputs=2)
    for row in range(2):
        laws = []
        for start in (0, 20):
            xs, ys = x[row, start : start + 20].double(), y[row, start : start + 20].double()
            law = torch.linalg.lstsq(xs, ys).solution
            # Inputs and outputs were rounded to float32 (3 products and 2 sums each): residuals of that size only.
            bound = 8 * torch.finfo(torch.float32).eps * (xs.abs() @ law.abs()).max()
            assert (xs @ law - ys).abs().max() <= bound
            laws.append(law)
        assert (laws[0] - laws[1]).abs().max() > 0.1


def test_regression_sequences_ask_at_inputs_only():
    settings = {"length": 7, "segment": 3, "inputs": 3, "outputs": 2, "noise": 0.1}
    x, y = recall.piecewise_linear(2, 9, **settings)
    inputs, labels = recall.in_context_regression(2, 9, **settings)
    assert torch.equal(inputs[:, 0::2], torch.cat([x, torch.zeros_like(y)], 2))
    assert torch.equal(inputs[:, 1::2], torch.cat([torch.zeros_like(x), y], 2))
    assert torch.equal(labels[:, 0::2], y)
    assert labels[:, 1::2].isnan().all()


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_passkey_prompt_fills_its_length_and_holds_its_answer_once(depth):
    made = passkey_prompt(3, length=1500, depth=depth)
    key = made.answer.strip()
    assert made.prompt.count(key) == 2  # the needle says it twice
    assert 1200 < len(made.prompt + made.answer) <= 1500
    place = made.prompt.index("The pass key is")
    assert abs(place / len(made.prompt) - depth) < 0.25
    assert abs(made.depth - depth) < 0.1


def test_a_passkey_is_measured_in_the_tokens_of_the_caller():
    made = passkey_prompt(1, length=120, measure=lambda text: len(text.split()))
    assert 60 < len((made.prompt + made.answer).split()) <= 120


def test_passkey_bytes_ask_for_the_digits():
    inputs, labels = passkey_bytes(4, 2, length=300, digits=6)
    for row, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        answer = bytes(label for label in wanted if label != IGNORE).decode()
        assert len(answer) == 6
        assert f"The pass key is {answer}." in bytes(row).decode()


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (recall.multi_query_recall, {"pairs": 9, "vocabulary": 16}, "vocabulary=16 has 7 keys"),
        (recall.multi_query_recall, {"length": 20, "pairs": 7}, "take 21 tokens"),
        (recall.multi_query_recall, {"queries": 9, "pairs": 8}, "queries=9"),
        (recall.multi_query_recall, {"rewrites": 9, "pairs": 8}, "rewrites=9"),
        (recall.multi_query_recall, {"gap": -1}, "gap=-1"),
        (recall.recall_at_distance, {"distance": 15, "pairs": 8}, "need a distance of 16 to 241"),
        (recall.recall_at_distance, {"distance": 242, "pairs": 8}, "need a distance of 16 to 241"),
        (recall.recall_at_distance, {"distance": (30, 20)}, r"distance=\(30, 20\)"),
        (recall.permutation_tracking, {"moves": "cycles"}, "moves='cycles'"),
        (recall.permutation_tracking, {"elements": 7}, "elements=7"),
        (recall.piecewise_linear, {"segment": 0}, "segment=0"),
        (passkey_prompt, {"length": 50}, "length=50"),
        (passkey_prompt, {"length": 500, "depth": 1.5}, "depth=1.5"),
    ],
)
def test_settings_that_do_not_fit_are_named(make, settings, message):
    arguments = (0,) if make is passkey_prompt else (2, 0)
    with pytest.raises(ValueError, match=message):
        make(*arguments, **settings)
