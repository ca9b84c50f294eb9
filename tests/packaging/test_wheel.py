# SPDX-License-Identifier: Apache-2.0
"""The wheel: what it holds, what it must not hold, and that it works where it is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHEEL_VARIABLE = "TILEWRIGHT_WHEEL"
OWN_LIBRARIES = ("tilewright/lib/libtilewright_ops.so",)
ADAPTERS = re.compile(r"tilewright/lib/libtilewright_(ops|cuda)\.so")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that `TILEWRIGHT_WHEEL` names, else one built here."""
    named = os.environ.get(WHEEL_VARIABLE)
    if named:
        return Path(named)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    lock = ROOT / ".venv" / "build.lock"
    locked = ["flock", str(lock), *command] if lock.parent.is_dir() and shutil.which("flock") else command
    done = subprocess.run(locked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def files(wheel) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel and this environment's packages, but not this checkout."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    script = ROOT / "scripts" / "overlay_venv.sh"
    made = subprocess.run([str(script), str(folder)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made.stdout.strip())
    return folder


def run_in(environment: Path, code: str, **extra: str) -> str:
    """Standard output of Python code run by the environment, outside the checkout."""
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-c", code],
        cwd=environment,
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | extra,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_native_parts_the_text_and_the_licence_are_in_it(files):
    wanted = [*OWN_LIBRARIES, "tilewright/py.typed", "tilewright/data/corpus/speeches.evaluation.txt"]
    assert set(wanted) <= set(files)
    assert any(re.match(r"tilewright/_host\..*\.so$", name) for name in files)
    assert any(name.endswith("/licenses/LICENSE") for name in files)


def test_nothing_else_is_in_it(files):
    top = {name.partition("/")[0] for name in files}
    assert {name for name in top if not re.fullmatch(r"tilewright(-[\w.]+\.(dist-info|libs))?", name)} == set()
    model = {name for name in files if name.startswith("tilewright/data/ternary/")}
    assert {Path(name).name for name in model} == {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    counted = {"tilewright/edge/tellme/synthesis.json"}
    kinds = {Path(name).suffix for name in files if name.startswith("tilewright/") and name not in model | counted}
    assert kinds <= {".py", ".pyi", ".so", ".txt", ".md", ".typed", ""}


def test_no_file_names_a_path_of_the_building_machine(files):
    places = [str(path).encode() for path in (ROOT, Path.home(), Path(sys.prefix)) if str(path) != "/"]
    found = [(name, place) for name, data in files.items() for place in places if place in data]
    assert not found


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) reads the libraries' headers")
def test_the_operators_need_neither_python_nor_a_fixed_place_of_torch(files, tmp_path):
    for name in filter(ADAPTERS.fullmatch, files):
        path = tmp_path / Path(name).name
        path.write_bytes(files[name])
        header = subprocess.run(["readelf", "-dW", str(path)], capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", header)
        assert not [library for library in needed if "python" in library]
        assert not re.search(r"\((RPATH|RUNPATH)\).*\[/", header)


def test_the_installed_wheel_runs_an_operator(environment):
    code = (
        "import torch, tilewright.ops as ops\n"
        "from tilewright.formats.int4 import quantize_int4\n"
        "torch.manual_seed(0)\n"
        "weight = quantize_int4(torch.randn(20, 64), 32)\n"
        "x = torch.randn(3, 64)\n"
        "exact = x.double() @ weight.dequantize(torch.float64).T\n"
        "y = ops.int4_fp8_linear(x, weight.pack())\n"
        "print(ops.__file__)\n"
        "print(float((y - exact).norm() / exact.norm()))\n"
    )
    place, error = run_in(environment, code).split()
    assert Path(place).is_relative_to(environment)
    # Each FP8 activation is within 2^-4 of its value, relatively; the errors of 64 products cannot add up to more.
    assert 0 < float(error) < 2**-4


def test_the_installed_command_is_healthy(environment):
    code = "import sys; sys.argv = ['tw', 'doctor', '--json']\nfrom tilewright.cli import main\nmain()"
    found = json.loads(run_in(environment, code))
    assert found["problems"] == []
    assert Path(found["libraries"]["cpu"]["path"]).is_relative_to(environment)


def test_the_installed_package_keeps_its_cache_outside_itself(environment, tmp_path):
    code = "from tilewright.data import cache_dir, corpus\nprint(cache_dir())\nassert corpus('speeches', 'evaluation')"
    assert run_in(environment, code, XDG_CACHE_HOME=str(tmp_path)).strip() == str(tmp_path / "tilewright")
