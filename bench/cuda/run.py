# SPDX-License-Identifier: Apache-2.0
"""Run the benchmarks of a CUDA device: `python -m bench.cuda.run [--only GLOB] [--output FILE] [--seconds N]`.

Each kernel's module runs in a process of its own, so that one that fails takes no other with it. One JSON line a method
goes to `bench/cuda/results/<device>.jsonl`; a later run replaces the lines of the cases that it runs.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import pkgutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.records import ROOT, commit
from tilewright._files import atomic_write

NO_KERNEL = {"cases", "report", "run", "timing"}


def built_commit() -> str:
    """The commit of libraries that were built elsewhere (scripts/gpu_bundle.sh), else of this checkout."""
    bundle = ROOT / "build" / "bundle" / "commit"
    return bundle.read_text(encoding="utf-8").strip() if bundle.is_file() else commit()


def modules() -> list[str]:
    """Names of the kernels' modules."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in NO_KERNEL)


def slug(device: str) -> str:
    """A file name for a device's results."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def failure(case: str, reason: str) -> dict[str, Any]:
    """The record of what could not be measured."""
    return {"kind": "cuda", "case": case, "op": "tilewright", "error": reason}


def records_of(case: Any, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """One record a method of the case."""
    from bench.cuda.timing import time_in_turn

    times = time_in_turn(case.make(), case.calls)
    ours = times.get("tilewright", {}).get("median_ns")
    found = []
    for method, result in times.items():
        record = {"kind": "cuda", "case": case.name, "op": method, "note": case.note, **result}
        if "median_ns" in result:
            seconds = 1e-9 * result["median_ns"]
            moving, computing = case.bytes / peaks["bytes"], case.operations / peaks.get(case.peak, peaks["bf16"])
            floor = max(moving, computing)
            record |= {"bytes": case.bytes, "operations": case.operations, "floor_ns": 1e9 * floor}
            record |= {"of_floor": floor / seconds, "bound": case.peak if computing > moving else "bytes"}
            if ours and method != "tilewright":
                record["tilewright_is_faster"] = result["median_ns"] / ours
        found.append(record)
    return found


def worker(module: str, only: list[str], peaks: dict[str, float], seconds: float) -> None:
    """In a process of its own: print one JSON line a record as it comes."""
    import torch

    from bench.cuda.timing import described

    ends = time.monotonic() + seconds
    for case in importlib.import_module(f"bench.cuda.{module}").cases():
        if not any(fnmatch.fnmatch(case.name, pattern) for pattern in only):
            continue
        if time.monotonic() > ends:
            print(f"bench: {module}: out of time before {case.name}", file=sys.stderr, flush=True)
            break
        try:
            for record in records_of(case, peaks):
                print(json.dumps(record), flush=True)
        except Exception as error:
            print(json.dumps(failure(case.name, described(error))), flush=True)
        torch.cuda.empty_cache()


def line(record: dict[str, Any]) -> str:
    """A record for people."""
    if "error" in record:
        return f"{record['case']:44} {record['op']:22} {record['error']}"
    ratio = f"{record['tilewright_is_faster']:7.2f} x" if "tilewright_is_faster" in record else ""
    return (
        f"{record['case']:44} {record['op']:22} {record['median_ns'] / 1e3:10.1f} us {100 * record['of_floor']:5.0f} % "
        f"of the {record['bound']} floor{'' if record['graph'] else ' (no graph)'} {ratio}"
    )


def main() -> None:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="GLOB", help="cases to run")
    parser.add_argument("--module", action="append", choices=modules(), help="kernels to run")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which a kernel starts no further case")
    parser.add_argument("--output", type=Path, help="file of JSON lines")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--peaks", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    only = options.only or ["*"]
    if options.worker:
        worker(options.worker, only, options.peaks, options.seconds)
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("bench: torch.cuda.is_available() is False: these benchmarks need a CUDA device")
    from bench.cuda.timing import ceilings

    device = torch.cuda.get_device_name()
    peaks = ceilings()
    torch.cuda.empty_cache()
    print(f"{device}: " + ", ".join(f"{name} {value / 1e12:.4g} T/s" for name, value in peaks.items()), flush=True)
    where = {"device": device, "torch": torch.__version__, "ceilings": peaks, "commit": built_commit()}
    records: list[dict[str, Any]] = []
    for module in options.module or modules():
        command = [sys.executable, "-m", "bench.cuda.run", "--worker", module, "--peaks", json.dumps(peaks)]
        command += ["--seconds", str(options.seconds), *(word for pattern in only for word in ("--only", pattern))]
        try:
            limit = 2 * options.seconds + 30
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=limit)
            output, status = done.stdout, done.returncode
        except subprocess.TimeoutExpired as stopped:
            output, status = (stopped.stdout or b"").decode(), 124
        found = [json.loads(text) for text in output.splitlines() if text.startswith("{")]
        if status:
            found.append(failure(module, f"the process ended with {status}"))
        for record in found:
            print(line(record), flush=True)
        records += [{**record, "kernel": module, **where} for record in found]
    path = options.output or Path(__file__).parent / "results" / f"{slug(device)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    ran = {record["case"] for record in records}
    old = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    with atomic_write(path) as partial:
        kept = [record for record in old if record["case"] not in ran]
        partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept + records), encoding="utf-8")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
