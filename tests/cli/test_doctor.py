# SPDX-License-Identifier: Apache-2.0
"""`tw doctor` tells the truth about this machine, and fails when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from typer.testing import CliRunner

from tilewright import _native, doctor
from tilewright.cli.app import app
from tilewright.cli.codes import ExitCode


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_a_working_installation_has_no_problems():
    result = invoke("--json")
    found = json.loads(result.stdout)
    assert found["problems"] == []
    assert result.exit_code == ExitCode.OK
    assert found["torch"]["version"] == torch.__version__
    assert found["libraries"]["cpu"]["loaded"]


def test_the_table_names_every_optional_package_and_peer():
    text = invoke().stdout
    assert all(name in text for name in (*doctor.OPTIONAL, "llama.cpp", "ik_llama.cpp", "cuda operators"))


def test_absent_native_code_is_a_problem_with_its_reason(monkeypatch):
    absent = _native.LibraryStatus(None, False, "libtilewright_ops.so was not built")
    monkeypatch.setattr(_native, "cpu_library", lambda: absent)
    result = invoke()
    assert result.exit_code == ExitCode.FAILED
    assert "problem: no native operators: libtilewright_ops.so was not built" in result.stdout


def test_a_torch_too_old_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    found = json.loads(invoke("--json").stdout)
    assert found["problems"] == ["torch 2.9.1+cpu is too old; >= 2.10 is needed"]


def test_a_cuda_device_without_operators_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    absent = _native.LibraryStatus(None, False, "built without nvcc, so without CUDA")
    monkeypatch.setattr(_native, "cuda_library", lambda: absent)
    found = json.loads(invoke("--json").stdout)
    assert any("built without nvcc" in problem for problem in found["problems"])
    assert found["torch"]["devices"] == ["a device"]


def test_an_impossible_override_is_a_problem():
    done = subprocess.run(
        [sys.executable, "-m", "tilewright.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TILEWRIGHT_ISA": "avx1024"},
    )
    assert done.returncode == ExitCode.FAILED
    assert any("TILEWRIGHT_ISA=avx1024" in problem for problem in json.loads(done.stdout)["problems"])


def test_the_machine_of_a_measurement_is_named():
    machine = doctor.machine()
    assert machine["processor"]
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert machine["isa"] in ("generic", "avx2", "avx512", "avx512_bf16")
