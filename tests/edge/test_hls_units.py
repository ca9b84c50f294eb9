# SPDX-License-Identifier: Apache-2.0
"""The HLS units against the contract, bit for bit, values and status."""

from __future__ import annotations

import numpy as np
import pytest
from edge_inputs import POINT_IDS, POINTS, adversarial_rows, halves, small_layer

from tilewright.edge import contract as c
from tilewright.edge.contract.layer import PythonUnits
from tilewright.edge.contract.weights import accumulate
from tilewright.edge.hls import HlsUnits, points

at_points = pytest.mark.parametrize("tiling", POINTS, ids=POINT_IDS)
WIDTHS = (1, 15, 16, 17, 96, 200)


def same(unit: str, *arguments: object, tiling: c.Tiling = POINTS[1], **keywords: object) -> c.Status:
    """Both implementations' results are equal; the status of both."""
    registers = c.StatusRegister(), c.StatusRegister()
    found = [
        getattr(units, unit)(*arguments, status=register, **keywords)
        for units, register in zip((PythonUnits(), HlsUnits(tiling)), registers, strict=True)
    ]
    pair = [one if isinstance(one, tuple) else (one,) for one in found]
    for python, hls in zip(*pair, strict=True):
        assert python.dtype == hls.dtype
        assert np.array_equal(python.view(np.uint16) if python.dtype == np.float16 else python,
                              hls.view(np.uint16) if hls.dtype == np.float16 else hls)  # fmt: skip
    assert registers[0].value == registers[1].value
    return registers[0].value


def test_the_points_are_compiled() -> None:
    assert {(t.g, t.t, t.q, t.p) for t in POINTS} <= set(points())
    with pytest.raises(ValueError, match="not compiled"):
        HlsUnits(c.Tiling(3, 5, 4, 2))


@at_points
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 3), (33, 85), (192, 576)])
def test_tlmm(rng: np.random.Generator, tiling: c.Tiling, outputs: int, inputs: int) -> None:
    weight = rng.integers(-1, 2, (outputs, inputs)).astype(np.int8)
    x = np.concatenate([
        rng.choice(np.array([-128, -127, -1, 0, 1, 127], np.int8), (2, inputs)),
        np.full((1, inputs), -128, np.int8), np.zeros((1, inputs), np.int8),
    ])  # fmt: skip
    packed = c.pack_tlmm(weight, tiling)
    assert same("tlmm", x, packed, tiling=tiling) == c.Status(0)
    assert np.array_equal(HlsUnits(tiling).tlmm(x, packed), accumulate(x, weight))


@pytest.mark.parametrize("sign", [-1, 1])
def test_tlmm_at_the_papers_size_with_sums_beyond_int16(sign: int) -> None:
    """4096 inputs of one sign: 520,192, where kernels that add 128 pair products in int16 give -528,384."""
    packed = c.pack_tlmm(np.full((16, 4096), sign, np.int8))
    x = np.full((1, 4096), 127, np.int8)
    assert (HlsUnits().tlmm(x, packed) == sign * 520192).all()


@pytest.mark.parametrize(("outputs", "inputs"), [(1536, 1536), (4096, 1536), (1536, 4096)])
def test_tlmm_on_whole_matrices_of_the_0_73b_model(rng: np.random.Generator, outputs: int, inputs: int) -> None:
    weight = rng.integers(-1, 2, (outputs, inputs), dtype=np.int8)
    x = rng.integers(-127, 128, (1, inputs), dtype=np.int8)
    assert np.array_equal(HlsUnits().tlmm(x, c.pack_tlmm(weight)), accumulate(x, weight))


@at_points
def test_loader_puts_each_vector_at_its_address(rng: np.random.Generator, tiling: c.Tiling) -> None:
    packed = c.pack_tlmm(rng.integers(-1, 2, (37, 50)).astype(np.int8), tiling)
    norm = rng.standard_normal(50).astype(np.float16)
    point = points()[tiling.g, tiling.t, tiling.q, tiling.p]
    indices, norms, status = point.load(c.beats_of(packed, norm, point.beat_bits), 50, 37, 50)
    assert np.array_equal(indices, packed.indices.reshape(-1, tiling.t))
    assert np.array_equal(norms, norm.view(np.uint16))
    assert status == 0
    packed.indices[0, 1, 2] = tiling.codes
    *_, status = point.load(c.beats_of(packed, norm, point.beat_bits), 50, 37, 50)
    assert status == c.Status.BAD_INDEX


def test_a_matrix_beyond_the_buffer_is_refused_with_a_status_bit() -> None:
    tiling = POINTS[1]
    point = points()[tiling.g, tiling.t, tiling.q, tiling.p]
    status = c.StatusRegister()
    outputs = point.buffer_vectors + 4
    with pytest.raises(RuntimeError, match=r"at the end|empty stream"):
        HlsUnits(tiling).tlmm(np.zeros((1, 1), np.int8), c.pack_tlmm(np.zeros((outputs, 1), np.int8), tiling), status)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_max(rng: np.random.Generator, width: int) -> None:
    for x in (adversarial_rows(width) if width > 2 else halves(rng, 3, width), halves(rng, 12, width, spread=4.0)):
        for eps in (0.0, 1e-6, 1e-5):
            same("rms_max", x, halves(rng, width, spread=1.0), c.NormConstants.of(width, eps))
        same("row_max", x)


@pytest.mark.parametrize("width", WIDTHS)
def test_quantize(rng: np.random.Generator, width: int) -> None:
    for x in (adversarial_rows(width) if width > 2 else halves(rng, 3, width), halves(rng, 12, width, spread=4.0)):
        same("quantize", x, c.row_max(x))
        same("quantize", x, c.row_max(x) // 2)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", ["bypass", "residual", "silu", "squared_relu"])
def test_dequant_fuse(rng: np.random.Generator, width: int, mode: str) -> None:
    acc = rng.integers(-(2**19), 2**19, (6, width)).astype(np.int32)
    acc[0], acc[1, -1], acc[2, 0] = 0, 2**31 - 1, -(2**31)
    scale = np.maximum(c.row_max(halves(rng, 6, 3)), 0x00A8)
    for gamma in (1e-4, 0.02, 3.0):
        side = None if mode == "bypass" else halves(rng, 6, width)
        same("dequant_fuse", acc, scale, c.Factor.of(gamma / 127), mode, side)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 6), (2, 16), (9, 64)])
def test_dequant_rope(rng: np.random.Generator, heads: int, size: int) -> None:
    acc = rng.integers(-(2**19), 2**19, (5, heads * size)).astype(np.int32)
    acc[:, ::3] >>= 17
    scale = np.maximum(c.row_max(halves(rng, 5, 3)), 0x00A8)
    same("dequant_fuse", acc, scale, c.Factor.of(0.05 / 127), "rope", c.rope_table(5, size))


@at_points
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 2), (4, 2, 18), (9, 3, 64)])
@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_attention_and_its_traffic(
    rng: np.random.Generator, tiling: c.Tiling, heads: int, kv_heads: int, size: int, tokens: int
) -> None:
    q, k, v = (halves(rng, tokens, h, size, spread=1.0) for h in (heads, kv_heads, kv_heads))
    same("attention", q, k, v, tiling=tiling)
    units = HlsUnits(tiling)
    prefill = units.attention(q, k, v)
    reads = sum(range(tokens, 0, -tiling.p)) if tokens > 1 else 1
    assert units.traffic == [reads, reads]
    if tokens % tiling.p == 0:
        assert reads == tokens**2 / (2 * tiling.p) + tokens / 2
    steps = [units.attention(q[i : i + 1], k[: i + 1], v[: i + 1], first=i) for i in range(tokens)]
    assert np.array_equal(prefill, np.concatenate(steps)), "decode attention is prefill attention"


def test_attention_with_wild_inputs(rng: np.random.Generator) -> None:
    q = halves(rng, 9, 2, 8, spread=4.0)
    q[3, 0, 1], q[4, 1, 2] = np.nan, np.inf
    assert same("attention", q, q[:, :1], q[:, 1:]) & c.Status.NONFINITE


@at_points
@pytest.mark.parametrize("gate_map", ["silu", "squared_relu"])
def test_a_layer(rng: np.random.Generator, tiling: c.Tiling, gate_map: str) -> None:
    layer = small_layer(rng, tiling, gate_map)
    x = halves(rng, 7, 24, spread=0.3)
    angles = c.rope_table(8, layer.head_size)
    python, hls = (c.KvCache.empty(8, layer.kv_heads, layer.head_size) for _ in range(2))
    assert np.array_equal(
        c.decoder_layer(x, layer, python, angles), c.decoder_layer(x, layer, hls, angles, HlsUnits(tiling))
    )
    one = halves(rng, 1, 24, spread=0.3)
    assert np.array_equal(
        c.decoder_layer(one, layer, python, angles), c.decoder_layer(one, layer, hls, angles, HlsUnits(tiling))
    )
    assert np.array_equal(python.k, hls.k)
    assert np.array_equal(python.v, hls.v)


def test_a_layer_of_smollm2s_shape(rng: np.random.Generator) -> None:
    """Width 576, nine heads over three: nothing is a multiple of 84."""

    def linear(inputs: int, outputs: int, norm: bool = False) -> c.Linear:
        weight = c.pack_tlmm(rng.integers(-1, 2, (outputs, inputs), dtype=np.int8))
        return c.Linear(weight, c.Factor.of(0.01), np.ones(inputs, np.float16) if norm else None)

    layer = c.Layer(
        linear(576, 576, True), linear(576, 192), linear(576, 192), linear(576, 576), linear(576, 1536, True),
        linear(576, 1536), linear(1536, 576), heads=9, kv_heads=3, head_size=64, eps=1e-5,
    )  # fmt: skip
    x = halves(rng, 3, 576, spread=0.3)
    found = [
        c.decoder_layer(x, layer, c.KvCache.empty(3, 3, 64), c.rope_table(3, 64), units)
        for units in (PythonUnits(), HlsUnits())
    ]
    assert np.array_equal(*found)


def test_the_generated_header_is_what_the_contract_says() -> None:
    from pathlib import Path

    from tilewright.edge.contract.export import cpp

    header = Path(__file__).parents[2] / "hls" / "include" / "tilewright_hls" / "tables.h"
    assert header.read_text() == cpp(), f"run python -m tilewright.edge.contract.export cpp {header}"
