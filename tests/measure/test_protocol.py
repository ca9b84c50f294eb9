# SPDX-License-Identifier: Apache-2.0
"""The measuring protocol over runners whose answers are known."""

from __future__ import annotations

import json
import mmap

import numpy as np
import pytest
import torch

from tilewright.measure import protocol
from tilewright.measure.protocol import Spec

VOCABULARY = 11


class Counter:
    """A runner whose most likely next token is the last one plus one, modulo the vocabulary."""

    def __init__(self, model, threads, max_length, **options):
        self.made_with = (model, threads, max_length, options)
        self.tokens: list[int] = []

    def facts(self):
        return {"bytes": 7, "bits_per_weight": 4.0, "library": "counting"}

    def reset(self):
        self.tokens = []

    def prefill(self, tokens):
        self.tokens += tokens
        return (self.tokens[-1] + 1) % VOCABULARY

    def step(self, token):
        return self.prefill([token])

    def logits(self, tokens):
        return np.random.default_rng(len(tokens)).normal(size=(len(tokens), VOCABULARY)).astype(np.float32)


def runner() -> Counter:
    return Counter("m", 1, 8)


def test_negative_log_likelihood_is_that_of_torch_in_float64():
    tokens = [3, 1, 4, 1, 5, 9]
    logits = runner().logits(tokens)
    logits[2] += 1000
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:-1], dtype=torch.float64), torch.tensor(tokens[1:]), reduction="sum"
    )
    # Both are float64 sums of a few terms of size up to 1000.
    assert protocol.negative_log_likelihood(logits, tokens) == pytest.approx(float(expected), rel=1e-12)


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    class Uniform(Counter):
        def logits(self, tokens):
            return np.full((len(tokens), VOCABULARY), 2.5, dtype=np.float32)

    windows = [[1, 2, 3], [4, 5, 6, 7]]
    assert protocol.perplexity(Uniform("m", 1, 8), windows) == pytest.approx(VOCABULARY, rel=1e-12)


def test_greedy_stops_before_the_stop_token():
    assert protocol.greedy(runner(), [3], 20, [7]) == [4, 5, 6]
    assert protocol.greedy(runner(), [3], 4, []) == [4, 5, 6, 7]
    assert protocol.greedy(runner(), [6], 20, [7]) == []


def test_the_longest_part_sets_the_length():
    spec = Spec("r", "m", 1, windows={"a": [[0] * 9]}, prompt=[0] * 5, decode=20, prompts=[[0] * 7], new_tokens=3)
    assert spec.max_length == 25
    assert Spec("r", "m", 1, prompt=[0] * 5).max_length == 5 + protocol.WARM_STEPS


def test_a_spec_survives_json():
    spec = Spec("r", "m", 2, windows={"a": [[1, 2]]}, prompt=[3], options={"act": "int8"})
    assert Spec(**json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_measurement_has_every_part_once():
    spec = Spec("r", "m", 1, {"a": [[1, 2, 3]]}, [1, 2], decode=3, repeats=4, prompts=[[1], [2]], new_tokens=2)
    found = protocol.measure(Counter, spec)
    assert len(found["prefill_ns"]) == len(found["decode_ns"]) == 4
    assert found["generated"] == [[2, 3], [3, 4]]
    assert set(found["perplexity"]) == {"a"}
    assert found["resident_baseline_bytes"] > 0
    assert found["bytes"] == 7


def test_options_reach_the_runner():
    made = []
    protocol.measure(lambda *a, **k: made.append((a, k)) or runner(), Spec("r", "m", 3, options={"dtype": "x"}))
    assert made == [(("m",), {"threads": 3, "max_length": protocol.WARM_STEPS, "dtype": "x"})]


def test_resident_memory_sees_an_allocation():
    # Mapped rather than allocated: an allocator may hand out pages that are resident already.
    mapped = mmap.mmap(-1, 40 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held = np.frombuffer(mapped, dtype=np.uint8)
    before = {field: protocol.memory_bytes(field) for field in protocol.MEMORY.values()}
    held[:] = 1
    grown = {field: protocol.memory_bytes(field) - had for field, had in before.items()}
    assert grown["VmRSS"] > 0.9 * held.nbytes
    assert grown["RssAnon"] > 0.9 * held.nbytes
    assert protocol.memory_bytes("VmHWM") >= protocol.memory_bytes("VmRSS") - (8 << 20)
