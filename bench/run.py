# SPDX-License-Identifier: Apache-2.0
"""Run the cases of cases.toml and write one JSON line a result: `python -m bench.run [--only GLOB] [--threads N]`.

Operator cases of one thread count run in a process of their own, pinned to as many cores; whole models run one process
a method. Results replace `bench/results/<machine>.jsonl`; with --quick they only show that everything runs and go to
`reports/`.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
OPERATORS = (
    "linear", "ternary_linear", "attention", "linear_attention", "local_linear_attention", "sparse_gated_mlp",
    "capture", "cats_decode",
)  # fmt: skip
QUICK_SIZES = {
    "m": 8, "n": 64, "k": 128, "tokens": 64, "queries": 64, "layers": 2, "prompt": 32, "decode": 4, "shortest": 64,
    "longest": 256, "attention_until": 256, "batch": 2, "hidden": 64, "inner": 128,
}  # fmt: skip
SECONDS, QUICK_SECONDS = 2.0, 0.01


def load_cases(path: Path = BENCH / "cases.toml") -> list[dict[str, Any]]:
    """Every case with its `kind`, in the order of the file."""
    try:
        import tomllib
    except ModuleNotFoundError:
        raise SystemExit("bench: Python 3.11 or newer is needed to read cases.toml") from None
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return [{"kind": kind, **case} for kind in (*OPERATORS, "model") for case in tables.get(kind, [])]


def shrunk(case: dict[str, Any]) -> dict[str, Any]:
    """The case at a size that runs in a moment."""
    small: dict[str, Any] = {key: min(value, QUICK_SIZES[key]) for key, value in case.items() if key in QUICK_SIZES}
    if "compile" in case:  # the compiler takes a minute at any size
        small["compile"] = False
    return case | small | ({"rounds": 1, "repeats": 1, "windows": 1} if case["kind"] == "model" else {})


def say(line: str) -> None:
    """Progress, on standard error."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


def operator_worker(threads: int, cases: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """In the pinned process: all operator cases, each record named."""
    import torch

    torch.set_num_threads(threads)
    records = []
    for case in cases:
        say(f"{case['name']}, {threads} threads")
        found = importlib.import_module(f"bench.{case['kind']}").run_case(case, threads, seconds)
        records += [{"kind": case["kind"], "case": case["name"], **record} for record in found]
    return records


def run_operators(threads: int, cases: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Start this file as a worker on the first `threads` cores and read its records."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    request = json.dumps({"threads": threads, "cases": cases, "seconds": seconds})
    done = subprocess.run(
        [sys.executable, "-m", "bench.run", "--worker"],
        input=request,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=BENCH.parent,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return list(json.loads(done.stdout))


def judged(records: list[dict[str, Any]], case: dict[str, Any]) -> list[dict[str, Any]]:
    """The case's records, each with the goals it is held against and whether it reaches them."""
    for record in records:
        record["goals"] = []
        for goal in case.get("goals", []):
            ratios = record["ratios"].get(goal["measure"], {}) if "measure" in goal else record["ratios"]
            found = [value for name, value in ratios.items() if name == goal["over"] or is_variant(name, goal["over"])]
            if record["op"] == goal["of"] and found:
                record["goals"].append({**goal, "got": min(found), "reached": min(found) >= goal["at_least"]})
    return records


def is_variant(name: str, peer: str) -> bool:
    """Whether a method is a form or build of a peer ("llama.cpp (native build)"): a goal is over the best of them."""
    return name.startswith(f"{peer} ") and peer.endswith(".cpp")


def collect(cases: list[dict[str, Any]], counts: list[int], quick: bool) -> list[dict[str, Any]]:
    """All records of all cases at all thread counts."""
    from bench.records import environment

    seconds = QUICK_SECONDS if quick else SECONDS
    records = []
    for threads in counts:
        operators = [case for case in cases if case["kind"] in OPERATORS]
        found = run_operators(threads, operators, seconds) if operators else []
        for case in (case for case in cases if case["kind"] == "model"):
            run_case: Callable[..., list[dict[str, Any]]] = importlib.import_module("bench.models").run_case
            named = {"kind": "model", "case": case["name"]}
            found += [{**named, **record} for record in run_case(case, threads, quick, say)]
        for case in cases:
            judged([record for record in found if record["case"] == case["name"]], case)
        records += [{**record, **environment(threads)} for record in found]
    return records


def thread_counts(asked: list[int] | None) -> list[int]:
    """The counts asked for, else one thread and all cores."""
    cores = len(os.sched_getaffinity(0))
    if asked and max(asked) > cores:
        raise SystemExit(f"bench: --threads {max(asked)}: this machine has {cores} cores")
    return sorted(set(asked or [1, cores]))


def save(records: list[dict[str, Any]], output: Path | None, quick: bool) -> Path:
    """Write the JSON lines; a partial run (--only) keeps the lines of cases it did not run."""
    from bench.records import ROOT, machine_slug
    from tilewright._files import atomic_write

    folder = ROOT / "reports" if quick else BENCH / "results"
    path = output or folder / (machine_slug(records[0]["machine"]) + ".jsonl")
    ran = {(record["case"], record["threads"]) for record in records}
    old = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    kept = [record for record in old if (record["case"], record["threads"]) not in ran]
    with atomic_write(path) as partial:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept + records)
        partial.write_text("".join(lines), encoding="utf-8")
    return path


def main() -> None:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="GLOB", help="cases to run")
    parser.add_argument("--threads", action="append", type=int, help="thread counts; 1 and all cores when not given")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--json", action="store_true", help="print the records as one JSON list")
    parser.add_argument("--output", type=Path, help="file of JSON lines")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(operator_worker(**json.load(sys.stdin))))
        return
    cases = [case for case in load_cases() if any(fnmatch.fnmatch(case["name"], g) for g in options.only or ["*"])]
    if not cases:
        parser.error(f"no case matches {', '.join(options.only)}; --list names them")
    if options.list:
        rows = [{key: case[key] for key in ("kind", "name", "about")} for case in cases]
        print(json.dumps(rows, indent=2) if options.json else "\n".join(f"{r['name']}  {r['about']}" for r in rows))
        return
    records = collect(
        [shrunk(case) for case in cases] if options.quick else cases, thread_counts(options.threads), options.quick
    )
    path = save(records, options.output, options.quick)
    if options.json:
        print(json.dumps(records, indent=2, ensure_ascii=False))
    else:
        from bench.report import tables

        print(tables(records))
        print(f"saved {path}")


if __name__ == "__main__":
    main()
