# SPDX-License-Identifier: Apache-2.0
"""The simulated accelerator against the contract and its cycle model: SmolLM2's real layer, odd shapes, slow memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tilewright import _host
from tilewright.edge.contract import (
    MAX_CONTEXT,
    Factor,
    KvCache,
    Layer,
    Linear,
    Status,
    Tiling,
    decoder_layer,
    pack_tlmm,
    rope_table,
)
from tilewright.edge.model import EdgeModel
from tilewright.edge.rtl import RtlSession
from tilewright.edge.tellme.cycles import Pipelines, layer_counters

pytestmark = pytest.mark.skipif(not hasattr(_host, "Accelerator"), reason="built without Verilator")
TILING = Tiling(3, 28, 16, 4, lanes=8)
PIPELINES = 32
"""Cycles that a counter of a layer may be off besides its 2 %: four or so a matrix, for data and addresses."""


def one_layer(
    rng: np.random.Generator, width: int, gates: int, heads: int, kv_heads: int, size: int, norms: int
) -> EdgeModel:
    """A layer of random ternary weights, and an embedding of ordinary rows."""

    def linear(inputs: int, outputs: int, norm: bool) -> Linear:
        codes = rng.integers(-1, 2, (outputs, inputs)).astype(np.int8)
        weights = (1 + 0.1 * rng.standard_normal(inputs)).astype(np.float16)
        return Linear(pack_tlmm(codes, TILING), Factor.of(0.7 / np.sqrt(inputs) / 127), weights if norm else None)

    layer = Layer(
        q=linear(width, heads * size, True),
        k=linear(width, kv_heads * size, False),
        v=linear(width, kv_heads * size, False),
        o=linear(heads * size, width, norms == 4),
        gate=linear(width, gates, True),
        up=linear(width, gates, False),
        down=linear(gates, width, norms == 4),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        eps=1e-5,
    )
    rows = rng.standard_normal((70, width)).astype(np.float16)
    return EdgeModel([layer], rows, rows, np.ones(width, np.float16), 1e-5, 1e4, TILING)


@pytest.mark.parametrize(
    ("width", "gates", "heads", "kv_heads", "size", "norms", "tokens"),
    [(64, 64, 1, 1, 64, 4, 1), (320, 777, 5, 1, 64, 2, 6), (100, 130, 3, 3, 32, 4, 9), (576, 1536, 9, 3, 64, 2, 1)],
)
@pytest.mark.parametrize("latency", [4, 20, 60])
def test_cycles_and_values_are_the_models(rng, width, gates, heads, kv_heads, size, norms, tokens, latency):
    """Each counter of cycles, near and far memory, a prompt and a token behind it."""
    model = one_layer(rng, width, gates, heads, kv_heads, size, norms)
    session, true = RtlSession(model, 80, latency=latency), model.session(capacity=80)
    first = 0
    for count in (tokens, 1):
        before, ids = dict(session.counts), list(range(count))
        np.testing.assert_array_equal(session.hidden(ids).view(np.uint16), true.hidden(ids).view(np.uint16))
        wanted = layer_counters(model.layers[0], TILING, first, count, banks=2, pipelines=Pipelines(latency))
        for name, cycles in wanted.items():
            found = session.counts[name] - before[name]
            assert abs(found - cycles) < 0.02 * cycles + PIPELINES, f"{name}: {found}, the model says {cycles}"
        first += count
    assert session.status.value == true.status.value
    assert abs(session.counts["cycles"] - session.expected_total) < 0.02 * session.expected_total + 2 * PIPELINES


def test_a_prompt_longer_than_a_chunk_is_its_chunks(rng):
    model = one_layer(rng, 64, 64, 2, 1, 32, 4)
    session, true = RtlSession(model, 80), model.session(capacity=80)
    ids = list(range(session.build["RowsMax"] + 3))
    np.testing.assert_array_equal(session.hidden(ids).view(np.uint16), true.hidden(ids).view(np.uint16))
    assert session.counts["descriptors"] == 2 * 9


def test_the_end_of_the_largest_context(rng):
    """Of the second layer, whose places do not fit 16 bits: 4090 positions are there, six more fill the cache."""
    model = one_layer(rng, 64, 64, 2, 1, 128, 2)
    model = replace(model, layers=[model.layers[0], one_layer(rng, 64, 64, 2, 1, 128, 4).layers[0]])
    session, true = RtlSession(model), model.session()
    seen = MAX_CONTEXT - 6
    for name in ("keys", "values"):
        rows = session.map.of_buffer(session.memory, name).reshape(2, MAX_CONTEXT, 1, 128)
        rows[:] = rng.standard_normal(rows.shape).astype(np.float16)
        for layer, cache in zip(rows, true.caches, strict=True):
            (cache.k if name == "keys" else cache.v)[:seen] = layer[::-1][:seen]
    session.seen = seen
    for cache in true.caches:
        cache.seen = seen
    for ids in ([1, 2, 3, 4, 5], [6]):
        np.testing.assert_array_equal(session.hidden(ids).view(np.uint16), true.hidden(ids).view(np.uint16))
    for index, cache in enumerate(true.caches):
        np.testing.assert_array_equal(session.cache(index).k.view(np.uint16), cache.k.view(np.uint16))
    assert session.status.value == true.status.value == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_slow_memory_changes_cycles_and_nothing_else(rng, seed):
    model = one_layer(rng, 100, 130, 3, 3, 32, 4)
    fast, slow = RtlSession(model, 20), RtlSession(model, 20, latency=90, outstanding=2, pause=0.5, seed=seed)
    ids = [3, 1, 4, 1, 5]
    np.testing.assert_array_equal(fast.hidden(ids).view(np.uint16), slow.hidden(ids).view(np.uint16))
    np.testing.assert_array_equal(fast.cache(0).k.view(np.uint16), slow.cache(0).k.view(np.uint16))
    assert slow.counts["cycles"] > 1.3 * fast.counts["cycles"]


@pytest.mark.model
def test_a_real_layer_of_smollm2_is_the_contracts(smollm2_gguf):
    """Its fourth layer, weights rounded to ternary, on rows of its own embedding: a prompt, then a token."""
    from tilewright import models

    module = models.to_transformers(models.load(smollm2_gguf), dequantize=True)
    whole = EdgeModel.from_transformers(module)
    model = EdgeModel(
        [whole.layers[3]], whole.embedding, whole.head, whole.final_norm, whole.eps, whole.rope_base, TILING
    )
    session, layer = RtlSession(model, 16), model.layers[0]
    cache, angles = KvCache.empty(16, layer.kv_heads, layer.head_size), rope_table(16, layer.head_size, whole.rope_base)
    for ids in ([504, 3575, 314, 260, 2240], [351]):
        x = model.embedding[np.array(ids)]
        wanted = decoder_layer(x, layer, cache, angles)
        found = session.through_layers(x, lambda _: None)
        np.testing.assert_array_equal(found.view(np.uint16), wanted.view(np.uint16))
    assert session.status.value == Status(0)
    assert abs(session.counts["cycles"] - session.expected_total) < 0.02 * session.expected_total + 2 * PIPELINES
