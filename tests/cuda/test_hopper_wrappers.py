# SPDX-License-Identifier: Apache-2.0
"""Each wrapper of csrc/hopper on a real GPU, against plain loops (hopper_wrappers.cu)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "build" / "bundle" / "hopper_wrappers"
FLAGS = ["-std=c++20", "-O2", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of compute capability 9.0")
    if CARRIED.is_file():
        return CARRIED
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("neither nvcc nor a program carried in build/bundle")
    path = tmp_path_factory.mktemp("wrappers") / "hopper_wrappers"
    source = Path(__file__).with_suffix(".cu").with_name("hopper_wrappers.cu")
    subprocess.run([nvcc, *FLAGS, "-I", str(ROOT / "csrc"), "-o", str(path), str(source)], check=True)
    return path


def test_every_wrapper_computes_what_its_plain_form_does_on_cuda(program: Path) -> None:
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert sum(line.startswith("pass") for line in lines) > 100, done.stdout + done.stderr
    assert done.returncode == 0
