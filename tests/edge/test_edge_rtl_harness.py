# SPDX-License-Identifier: Apache-2.0
"""The simulated accelerator from outside: memory byte for byte, faults, limits, threads, broken images."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from descriptor_machine import machine
from edge_inputs import POINTS
from test_edge_rtl_cycles import one_layer
from typer.testing import CliRunner

from tilewright import _host
from tilewright.cli.app import app
from tilewright.data import ternary_model
from tilewright.edge.contract import Status
from tilewright.edge.image import compile_image
from tilewright.edge.model import EdgeModel
from tilewright.edge.program import Buffer
from tilewright.edge.rtl import BASE, ID, Register, RtlSession

pytestmark = pytest.mark.skipif(not hasattr(_host, "Accelerator"), reason="built without Verilator")
PROMPT = [3, 1, 4, 1, 5, 9]


@pytest.fixture
def model(rng: np.random.Generator) -> EdgeModel:
    """Two layers; no width is a multiple of what the build tiles it with."""
    first, second = (one_layer(rng, 100, 130, 3, 3, 32, norms) for norms in (4, 2))
    return EdgeModel(
        first.layers + second.layers, first.embedding, first.head, first.final_norm, 1e-5, 1e4, first.tiling
    )


def address(session: RtlSession, name: str) -> int:
    return BASE + session.map.places[name][0]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_memory_is_the_contracts_byte_for_byte_whatever_the_pauses(model: EdgeModel, seed: int) -> None:
    """Rows, padding, caches, and that nothing else is touched: against a machine made of the contract's functions."""
    true = RtlSession(model, 11, machine(**_host.Accelerator.parameters))
    timing = {"latency": 70 * seed, "outstanding": 1 + seed, "pause": 0.15 * seed, "seed": seed}
    session = RtlSession(model, 11, **timing)
    for tokens in (PROMPT, PROMPT[:1], PROMPT[2:5]):
        np.testing.assert_array_equal(session.hidden(tokens).view(np.uint16), true.hidden(tokens).view(np.uint16))
        np.testing.assert_array_equal(session.memory, true.memory)
    assert session.status.value == true.status.value == 0


def test_the_same_seed_takes_the_same_cycles(model: EdgeModel) -> None:
    def cycles(seed: int) -> int:
        session = RtlSession(model, 8, pause=0.3, seed=seed)
        session.hidden(PROMPT)
        return session.device.cycles

    assert cycles(5) == cycles(5)
    assert cycles(5) != cycles(6)


@pytest.mark.parametrize(
    ("place", "reads"),
    [("weights", True), ("program", True), ("stream", True), ("angles", True), ("keys", True), ("values", True),
     ("query", False), ("keys", False), ("values", False), ("mixed", False), ("gated", False), ("stream", False)],
)  # fmt: skip
def test_a_bus_error_ends_the_run_and_the_next_one_is_whole(model: EdgeModel, place: str, reads: bool) -> None:
    session = RtlSession(model, 8)
    # The newest token's key is the first that attention reads, and the last row of a chunk.
    row = (8 - len(PROMPT)) * session.map.strides["keys"] if place in ("keys", "values") else 0
    session.device.fail(address(session, place) + row, address(session, place) + row + 1, reads=reads, writes=not reads)
    with pytest.raises(RuntimeError, match="layer 0 at 0 tokens ended with BUS_ERROR: external memory"):
        session.hidden(PROMPT)
    assert session.status.value & Status.BUS_ERROR
    session.device.heal()
    true = model.session(capacity=8)
    np.testing.assert_array_equal(session.hidden(PROMPT).view(np.uint16), true.hidden(PROMPT).view(np.uint16))


@pytest.mark.parametrize("register", [Register.WEIGHTS, Register.PROGRAM, Register.BUFFERS + 8 * Buffer.GATE])
def test_addresses_outside_memory_are_bus_errors(model: EdgeModel, register: int) -> None:
    session = RtlSession(model, 8)
    session.hidden([7])
    session.device.write(register + 4, 1)
    session.device.write(Register.FIRST, 1)
    session.device.run(100_000)
    assert session.device.read(Register.STATUS) & Status.BUS_ERROR


def test_a_run_without_an_end_is_an_error_and_reset_begins_anew(model: EdgeModel) -> None:
    session = RtlSession(model, 8)
    session.hidden([7])
    session.device.write(Register.FIRST, 1)
    with pytest.raises(RuntimeError, match=r"no end within 200 cycles; 1 descriptors begun, .* unanswered w0 "):
        session.device.run(200)
    session.device.reset()
    assert session.device.read(Register.ID) == ID
    assert session.device.read(Register.CAPACITY) == 0
    again = RtlSession(model, 8)
    np.testing.assert_array_equal(again.hidden([7]), model.session(capacity=8).hidden([7]))


def test_a_callbacks_error_ends_a_run(model: EdgeModel) -> None:
    session = RtlSession(model, 60, pause=0.9)
    session.hidden([7])
    seen: list[int] = []

    def interrupted(cycles: int) -> None:
        seen.append(cycles)
        raise KeyboardInterrupt

    session.device.write(Register.TOKENS, 40)
    session.device.write(Register.FIRST, 1)
    with pytest.raises(KeyboardInterrupt):
        session.device.run(10**9, interrupted)
    assert len(seen) == 1


def test_two_run_at_once_with_other_threads_beside_them(model: EdgeModel) -> None:
    sessions = [RtlSession(model, 40, pause=0.2, seed=seed) for seed in (1, 2)]
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        found[index] = sessions[index].hidden(PROMPT * 5)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    steps = 0
    while any(thread.is_alive() for thread in threads):
        steps += 1
    true = model.session(capacity=40).hidden(PROMPT * 5)
    assert all(np.array_equal(found[index], true) for index in (0, 1))
    assert steps > 1000, "the interpreter is free while a run goes on"


def test_a_model_of_another_tiling_is_refused(rng: np.random.Generator) -> None:
    model = one_layer(rng, 100, 130, 3, 3, 32, 4)
    other = EdgeModel(model.layers, model.embedding, model.head, model.final_norm, 1e-5, 1e4, POINTS[1])
    with pytest.raises(ValueError, match="packed for G, T, Q = 3, 4, 4, the RTL was built for 3, 28, 16"):
        RtlSession(other, 8)


@pytest.mark.parametrize(
    ("memory", "keywords", "message"),
    [
        (np.zeros(64, np.int32), {}, "memory is int32 of 1 dimensions, needed writable uint8"),
        (np.zeros((2, 32), np.uint8), {}, "memory is uint8 of 2 dimensions"),
        (np.zeros(64, np.uint8)[::2], {}, "needed writable uint8"),
        (np.frombuffer(bytes(64), np.uint8), {}, "needed writable uint8"),
        (np.zeros(64, np.uint8), {"pause": 1.0}, "pause = 1, needed"),
        (np.zeros(64, np.uint8), {"outstanding": 0}, "outstanding = 0, needed 1 or more"),
    ],
)
def test_what_memory_cannot_be(memory: np.ndarray, keywords: dict[str, float], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        _host.Accelerator(memory, **keywords)


def test_an_image_that_is_cut_off_runs_nothing(model: EdgeModel, tmp_path: Path) -> None:
    path = tmp_path / "image"
    compile_image(model, path)
    path.write_bytes(path.read_bytes()[:-4096])
    words = ["edge", "simulate", str(path), "--engine", "rtl", "--tokenizer", str(ternary_model()), "--prompt", "a"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    assert "cut off or changed" in str(done.exception) + done.output


@pytest.mark.slow
def test_memory_notices_each_breach_of_its_protocol(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    root, program = Path(__file__).parents[2], tmp_path / "bench"
    sources = [str(Path(__file__).parent / "axi_memory_bench.cpp"), str(root / "csrc" / "host" / "rtl_memory.cpp")]
    command = [
        compiler,
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{root / 'csrc'}",
        *sources,
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "15 cases\n"
