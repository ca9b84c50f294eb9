# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, record all that is needed, and hold results against their goals; no time is asserted here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tomllib", reason="the benchmarks read their cases with Python 3.11's tomllib")
ROOT = Path(__file__).resolve().parents[2]
NEEDED = {
    "kind", "case", "op", "problem", "dtype", "device", "machine", "threads", "kernel", "median_ns", "p20_ns", "p80_ns",
    "repetitions", "operations", "ratios", "goals", "commit", "compiler", "clock_policy", "digest", "relative_error",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _bench_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def cases():
    from bench import run

    return run.load_cases()


def test_cases_have_unique_names_and_goals_on_methods_that_exist():
    from bench.peers import ik_llama_cpp, llama_cpp, torch_eager

    from bench import capture, cats_decode, linear, linear_attention, ternary_linear

    names = [case["name"] for case in cases()]
    assert len(names) == len(set(names))
    ours = {*linear.OURS, *linear_attention.METHODS, "tilewright FP8", "tilewright INT8", "tilewright ternary"}
    ours |= {f"sparse_gated_mlp {100 * share:.0f} %" for case in cases() for share in case.get("sparsities", [])}
    ours |= {cats_decode.named(share) for case in cases() for share in case.get("sparsities", [])}
    ours |= set(capture.methods())
    ours |= {f"{ternary_linear.OURS} {name}" for name in (*ternary_linear.PACKINGS, "auto")}
    others = {
        *torch_eager.FORMS,
        llama_cpp.RUNNER,
        ik_llama_cpp.RUNNER,
        "bandwidth",
        "peak",
        capture.BARE,
        cats_decode.DENSE,
    }
    others |= linear_attention.STANDARDS | linear_attention.METHODS
    for case in cases():
        for goal in case.get("goals", []):
            assert goal["of"] in ours
            assert goal["over"] in others | ours
            assert (case["kind"] == "model") == ("measure" in goal)


def test_a_quick_run_records_everything(tmp_path):
    path = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "bench.run", "--quick", "--threads", "1", "--output", str(path)]
    command += ["--only", "gemv-4096x4096", "--only", "prefill-512"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {record["op"] for record in records} == {
        "int4_int8_linear", "int4_fp8_linear", "int4_fp8_attention", "torch float32", "torch bfloat16",
    }  # fmt: skip
    assert all(set(record) >= NEEDED for record in records)
    first = next(record for record in records if record["op"] == "int4_int8_linear")
    assert {goal["over"] for goal in first["goals"]} == {"torch float32", "bandwidth"}
    assert first["bytes"] > 64 * 128 / 2
    assert str(path) in done.stdout


def test_a_summary_is_median_and_percentiles():
    from bench.timing import summary

    samples = [int(x) for x in np.random.default_rng(0).integers(100, 10_000, size=37)]
    found = summary(samples)
    expected = np.percentile(samples, [20, 50, 80])
    assert [found["p20_ns"], found["median_ns"], found["p80_ns"]] == pytest.approx(list(expected))
    assert found["repetitions"] == 37
    assert summary([5])["median_ns"] == 5


def test_rotating_copies_exceed_the_last_level_cache():
    from bench.timing import copies_beyond_cache, last_level_cache_bytes

    cache = last_level_cache_bytes()
    for size in (1, 1000, cache // 3, cache, 10 * cache):
        copies = copies_beyond_cache(size)
        assert copies >= 1
        assert copies * size >= 2 * cache


def test_works_take_turns_and_see_rising_numbers():
    from bench.timing import ROUNDS, time_in_turn

    seen: list[tuple[str, int]] = []
    works = {name: (lambda i, name=name: seen.append((name, i))) for name in ("a", "b")}
    samples = time_in_turn(works, seconds=0, least=2)
    assert [len(times) for times in samples.values()] == [2 * ROUNDS] * 2
    assert seen[2:6] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [i for name, i in seen[2:] if name == "a"] == list(range(2 * ROUNDS))


def test_a_work_in_another_process_says_its_own_time():
    from bench.timing import ROUNDS, Elapsed, time_in_turn

    assert time_in_turn({"peer": lambda i: Elapsed(7 + i)}, seconds=0, least=1)["peer"] == [
        7 + i for i in range(ROUNDS)
    ]


def test_a_ternary_case_is_complete(monkeypatch, tmp_path):
    from bench.ternary_linear import run_case

    monkeypatch.setenv("TILEWRIGHT_PEERS", str(tmp_path))
    records = run_case({"name": "small", "m": 2, "n": 64, "k": 256, "rotate": False}, 1, 0.01)
    ours = {r["op"]: r for r in records if r["op"].startswith("ternary_linear")}
    assert set(ours) == {"ternary_linear q2", "ternary_linear t3w", "ternary_linear auto"}
    assert all(set(r) >= {"problem", "dtype", "kernel", "median_ns", "ratios", "relative_error"} for r in records)
    assert len({r["digest"] for r in ours.values()}) == 1
    assert ours["ternary_linear q2"]["bits_per_weight"] < 2.01
    # Rounding activations to 8 bits costs every method the same: half a step of 1 / 127 in each of K terms at the most.
    assert all(r["relative_error"] < 0.02 for r in records)


def test_goals_take_the_best_form_of_a_peer():
    from bench.run import judged

    ratios = {"decode": {"llama.cpp": 3.0, "llama.cpp (native build)": 1.5, "ik_llama.cpp": 0.5}}
    goal = {"measure": "decode", "of": "ours", "over": "llama.cpp", "at_least": 2.0}
    (record,) = judged([{"op": "ours", "ratios": ratios}], {"goals": [goal]})
    assert record["goals"] == [{**goal, "got": 1.5, "reached": False}]


def test_goals_of_other_methods_or_absent_peers_are_left_out():
    from bench.run import judged

    goal = {"of": "ours", "over": "peak", "at_least": 0.5}
    other, absent = judged([{"op": "other", "ratios": {"peak": 1.0}}, {"op": "ours", "ratios": {}}], {"goals": [goal]})
    assert other["goals"] == absent["goals"] == []


def test_a_partial_run_keeps_the_other_lines(tmp_path):
    from bench.run import save

    path = tmp_path / "r.jsonl"
    old = [
        {"case": "a", "threads": 1, "v": 1},
        {"case": "a", "threads": 2, "v": 1},
        {"case": "b", "threads": 1, "v": 1},
    ]
    save(old, path, quick=False)
    save([{"case": "a", "threads": 1, "v": 2}], path, quick=False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((r["case"], r["threads"], r["v"]) for r in lines) == [("a", 1, 2), ("a", 2, 1), ("b", 1, 1)]


def test_tables_show_every_record_and_leave_out_empty_columns():
    from bench.report import operator_table

    record = {
        "op": "x", "median_ns": 1500.0, "p20_ns": 999.0, "p80_ns": 2e6, "operations": 3000, "relative_error": 0.25,
        "ratios": {"bandwidth": 0.855, "torch float32": 2.5},
    }  # fmt: skip
    lines = operator_table([record]).splitlines()
    assert lines[0] == "| method | median | spread | GOP/s | of bandwidth | times torch float32 | error |"
    assert lines[2] == "| x | 1.5 us | 999 ns to 2 ms | 2.0 | 86 % | 2.50 | 2.5e-01 |"


def test_an_unknown_case_names_the_way_out():
    command = [sys.executable, "-m", "bench.run", "--only", "nothing*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--list" in done.stderr
