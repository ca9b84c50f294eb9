# SPDX-License-Identifier: Apache-2.0
"""The dataflow region with bounded streams: any order of its processes, deadlock, broken frames."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from edge_inputs import POINT_IDS, POINTS, halves

from tilewright import _host
from tilewright.edge import contract as c
from tilewright.edge.hls import HlsUnits

HLS = Path(__file__).parents[2] / "hls"


def region(rng: np.random.Generator, tiling: c.Tiling, inputs: int, outputs: int, rows: int, norm: bool):
    weights = c.pack_tlmm(rng.integers(-1, 2, (outputs, inputs)).astype(np.int8), tiling)
    x, gain, scale = halves(rng, rows, inputs, spread=1.0), np.ones(inputs, np.float16), c.Factor.of(0.02)
    if norm:
        entered, largest = c.rms_max(x, gain, c.NormConstants.of(inputs, 1e-5))
    else:
        entered, largest = x, c.row_max(x)
    q, s = c.quantize(entered, largest)
    return x, weights, gain if norm else None, scale, c.dequantize(c.tlmm(q, weights), s, scale)


@pytest.mark.parametrize("tiling", POINTS, ids=POINT_IDS)
@pytest.mark.parametrize("norm", [True, False])
def test_any_order_and_the_least_depths_give_the_same_bits(
    rng: np.random.Generator, tiling: c.Tiling, norm: bool
) -> None:
    x, weights, gain, scale, expected = region(rng, tiling, 85, 37, 3, norm)
    for seed in range(4):
        got, most = HlsUnits(tiling).linear(x, weights, gain, 1e-5, scale, depth=1, seed=seed)
        assert np.array_equal(got, expected)
        assert most["normed"] == 6, "a whole row waits for its maximum"
        assert max(most[name] for name in most if name != "normed") == 1


def test_a_fifo_shorter_than_a_row_is_a_deadlock_and_named(rng: np.random.Generator) -> None:
    x, weights, gain, scale, _ = region(rng, POINTS[1], 85, 37, 2, True)
    with pytest.raises(RuntimeError, match="deadlock: rms_max writes to full 'normed' of depth 5") as caught:
        HlsUnits(POINTS[1]).linear(x, weights, gain, 1e-5, scale, row_depth=5)
    assert "quant reads from empty 'largest'" in str(caught.value)


def beats(width: int, lasts: list[int]) -> tuple[list[list[int]], list[bool]]:
    count = max(lasts) + 1
    return [[0x7BFF] * 16 for _ in range(count)], [i in lasts for i in range(count)]


@pytest.mark.parametrize(
    ("lasts", "status"),
    [
        ([2, 5], c.Status(0)),
        ([0, 3], c.Status.SHORT_FRAME),
        ([4, 7], c.Status.LONG_FRAME),
        ([0, 9], c.Status.SHORT_FRAME | c.Status.LONG_FRAME),
    ],
)
def test_broken_frames_set_a_bit_and_the_next_row_is_whole(lasts: list[int], status: c.Status) -> None:
    q, found = _host.hls.framed_quantize(*beats(48, lasts), 48, 2)
    assert c.Status(found) == status
    first = 48 if lasts[0] >= 2 else 16 * (lasts[0] + 1)
    assert q[0].tolist() == [127] * first + [0] * (48 - first)
    assert q[1, :16].tolist() == [127] * 16


def test_a_stream_that_ends_early_is_an_error_not_a_default_value() -> None:
    with pytest.raises(RuntimeError, match="read of the empty stream 'normed'"):
        _host.hls.framed_quantize(*beats(48, [2]), 48, 2)


@pytest.mark.slow
def test_the_tops_and_their_bench_build_with_a_plain_compiler(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / "bench"
    sources = [str(path) for path in [*sorted((HLS / "kernels").glob("*.cpp")), HLS / "tb" / "bench.cpp"]]
    command = [compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-pthread"]
    subprocess.run([*command, f"-I{HLS / 'include'}", *sources, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    assert "all equal" in done.stdout
