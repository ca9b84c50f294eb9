# SPDX-License-Identifier: Apache-2.0
"""The linear-attention benchmark: its peers compute the same thing, and every measure makes complete records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("tomllib", reason="the benchmarks read their cases with Python 3.11's tomllib")
ROOT = Path(__file__).resolve().parents[2]
OPS = ("delta", "gated_delta", "kda", "gla", "simple_gla", "lightning", "retention", "linear", "hgrn")
KEPT = {"op", "problem", "dtype", "kernel", "median_ns", "operations", "digest", "relative_error", "ratios"}


@pytest.fixture(autouse=True)
def _bench_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def case(**more):
    return {"kind": "linear_attention", "heads": 2, "key": 16, "value": 16, **more}


@pytest.mark.parametrize("op", OPS)
def test_peers_agree_with_the_definition(op):
    from bench import linear_attention as bench

    inputs = bench.draw(op, 128, 2, 16, 16)
    want = bench.exact(op, inputs, 128)
    forms = {"ours": bench.OPERATORS[op].call, **bench.peers(op, compiled=False)}
    assert "chunked torch" in forms
    for name, form in forms.items():
        # Float32 sums of at most 128 terms of either sign: far below, and far above any mistake in a formula.
        assert bench.relative(form(inputs), want) < 2e-5, name


@pytest.mark.parametrize("tokens", [1, 63, 64, 100])
@pytest.mark.parametrize("gate", ["none", "token", "channel"])
@pytest.mark.parametrize("delta", [False, True])
def test_chunked_torch_is_the_recurrence(tokens, gate, delta):
    from bench.peers.chunked_torch import chunked

    from tilewright.reference.linear_attention import recurrence

    q, k, v = (torch.randn(2, tokens, 3, size, dtype=torch.float64) for size in (5, 5, 7))
    k = torch.nn.functional.normalize(k, dim=-1)
    g = -torch.rand(2, tokens, 3, *([5] if gate == "channel" else []), dtype=torch.float64)
    g = None if gate == "none" else g
    beta = torch.rand(2, tokens, 3, dtype=torch.float64) if delta else None
    want, _ = recurrence(q, k, v, beta=beta, g=g, rule="delta" if delta else "additive")
    assert torch.allclose(chunked(q, k, v, g=g, beta=beta), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", ["gated_delta", "hgrn"])
def test_a_forward_case_is_complete(op):
    from bench.linear_attention import OPERATORS, run_case

    records = run_case(case(measure="forward", op=op, tokens=64), 1, 0.0)
    assert all(record.keys() >= KEPT for record in records)
    ours = next(record for record in records if record["op"] == OPERATORS[op].name)
    assert ours["ratios"].keys() >= {"chunked torch", "matrix product"}
    assert 0 < ours["relative_error"] < 1e-5


@pytest.mark.slow
def test_a_training_case_knows_the_forward_pass_and_the_memory():
    from bench.linear_attention import run_case

    records = run_case(case(measure="training", op="simple_gla", tokens=64), 1, 0.0)
    ours = next(record for record in records if record["op"] == "chunk_simple_gla")
    assert ours["ratios"]["its forward pass"] > 0
    assert ours["peak_bytes"] >= 0
    assert ours["relative_error"] < 1e-5


def test_lengths_double_and_compare_with_attention():
    from bench.linear_attention import run_case

    sizes = {"shortest": 64, "longest": 256, "attention_until": 128}
    records = run_case(case(measure="length", op="lightning", **sizes), 1, 0.0)
    ours = [record for record in records if record["op"] == "lightning_attn_func"]
    assert [record["problem"]["tokens"] for record in ours] == [64, 128, 256]
    assert all(0 < record["ratios"]["the median rate"] <= 1 for record in ours)
    assert ["torch attention" in record["ratios"] for record in ours] == [False, True, False]


def test_decoding_is_compared_at_two_positions_and_with_a_copy():
    from bench.linear_attention import COPY, DECODE, run_case

    records = run_case(case(measure="decode", op="gated_delta", batch=2, shortest=3, longest=70), 1, 0.0)
    by_name = {record["op"]: record for record in records}
    near, far = f"{DECODE} at the first position", f"{DECODE} at the second"
    assert by_name[far]["ratios"].keys() >= {near, COPY}
    assert by_name[far]["relative_error"] < 1e-5
    assert by_name[near]["bytes"] == 2 * 2 * 2 * 16 * 16 * 4


def test_the_report_shows_every_kind_of_record():
    from bench.linear_attention import run_case
    from bench.report import tables

    sizes = {"shortest": 64, "longest": 128, "attention_until": 128}
    goal = {"of": "lightning_attn_func", "over": "the median rate", "at_least": 0.0}
    records = run_case(case(measure="length", op="lightning", **sizes), 1, 0.0)
    for record in records:
        record |= {"kind": "linear_attention", "case": "length", "threads": 1}
        record["goals"] = [{**goal, "got": 1.0, "reached": True}] if record["op"] == goal["of"] else []
    text = tables(records)
    assert "| method | tokens | median | spread | tok/s |" in text
    assert "- lightning_attn_func T=64: 1.00 of the median rate, goal 0.00: reached" in text


def test_operations_are_those_of_the_formulas():
    from bench.linear_attention import operations

    sizes = {"heads": 1, "key": 128, "value": 128}
    assert operations("delta", sizes, 1) == 6 * 128**2 + 64 * 7 * 128
    assert operations("linear", sizes, 10) == 10 * (4 * 128**2 + 2 * 64 * 256)
    assert operations("linear", sizes, 1, training=True) > 3 * operations("linear", sizes, 1)
    assert operations("hgrn", sizes, 5) == 5 * 2 * 128
