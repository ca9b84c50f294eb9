# SPDX-License-Identifier: Apache-2.0
"""Packed ternary weights: every packing returns what went in, and foreign ones are byte for byte those programs'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tilewright.formats import PackedTernary, pack_ternary, wrap_ternary
from tilewright.formats.ternary import FORMATS

RAGGED = ("q2", "t3w", "t5", "mma2", "hf")


def random_weight(rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8)


@pytest.mark.parametrize("packing", RAGGED)
@pytest.mark.parametrize("shape", [(1, 1), (33, 70), (64, 128), (65, 129), (200, 31), (5, 0), (0, 5)])
def test_any_shape_survives(packing: str, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    assert torch.equal(pack_ternary(weight, packing).unpack(), weight)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_packings_convert_into_each_other(source: str, target: str) -> None:
    weight = random_weight(70, 256)
    packed = pack_ternary(weight, source, scale=0.5).convert(target)
    assert packed.format == target
    assert torch.equal(packed.unpack(), weight)
    assert torch.equal(packed.payload, pack_ternary(weight, target, scale=0.5).payload)
    assert torch.equal(packed.dequantize(), weight * 0.5)


def test_bits_a_weight() -> None:
    weight = random_weight(512, 2304)
    bits = {name: pack_ternary(weight, name).payload.numel() * 8 / weight.numel() for name in FORMATS}
    assert bits["q2"] == bits["mma2"] == bits["i2_s"] == bits["hf"] == 2
    assert bits["t3w"] == pytest.approx(16 / 9)
    assert bits["t5"] == pytest.approx(1.6, rel=1e-3)
    assert bits["tq1_0"] == 1.6875
    assert bits["tq2_0"] == 2.0625


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3])
def test_llama_cpp_blocks_are_those_of_the_gguf_package(name: str, scale: float) -> None:
    gguf = pytest.importorskip("gguf")
    weight = random_weight(6, 1024)
    weight[:, ::256] = 1  # a block's scale is its largest magnitude
    kind = getattr(gguf.GGMLQuantizationType, name)
    half = torch.tensor(scale, dtype=torch.float16).float()
    theirs = torch.from_numpy(gguf.quants.quantize((weight * half).numpy().astype(np.float32), kind).copy())
    ours = pack_ternary(weight, name.lower(), scale=scale)
    assert torch.equal(ours.payload, theirs.reshape(-1))
    back = wrap_ternary(theirs, (6, 1024), name.lower())
    assert torch.equal(back.unpack(), weight)
    assert torch.equal(back.scale, half.reshape(1))
    assert torch.equal(back.dequantize(), torch.from_numpy(gguf.quants.dequantize(theirs.numpy(), kind).copy()))


def test_rows_of_llama_cpp_may_have_scales_of_their_own_and_blocks_may_not() -> None:
    weight = random_weight(3, 512)
    packed = pack_ternary(weight, "tq2_0", scale=torch.tensor([1.0, 2.0, 4.0]))
    back = wrap_ternary(packed.payload, (3, 512), "tq2_0")
    assert back.scale.tolist() == [1.0, 2.0, 4.0]
    payload = packed.payload.clone()
    payload[66 * 3 - 1] = 0  # the second block of row 1
    with pytest.raises(ValueError, match="row 1 has blocks of different scales"):
        wrap_ternary(payload, (3, 512), "tq2_0")


@pytest.mark.parametrize("rows", [8, 7, 5])
def test_transformers_layout_is_that_of_transformers(rows: int) -> None:
    """BitNet checkpoints: row r of quarter i in bits 2i, value + 1."""
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    weight = random_weight(rows, 12)
    theirs = bitnet.pack_weights(weight.clone())
    ours = pack_ternary(weight, "hf")
    assert torch.equal(ours.payload.view(-1, 12), theirs.to(torch.uint8))
    assert torch.equal(wrap_ternary(theirs, (rows, 12), "hf", 0.25).dequantize(), weight * 0.25)


def test_bitnet_cpp_layout_is_its_description() -> None:
    """Runs of 128 columns; byte j holds columns j, 32+j, 64+j, 96+j from the top bits down, value + 1."""
    weight = random_weight(3, 256)
    runs = (weight.to(torch.int64) + 1).view(3, 2, 4, 32)
    theirs = (runs[:, :, 0] << 6 | runs[:, :, 1] << 4 | runs[:, :, 2] << 2 | runs[:, :, 3]).to(torch.uint8)
    assert torch.equal(pack_ternary(weight, "i2_s").payload, theirs.reshape(-1))
    assert torch.equal(wrap_ternary(theirs, (3, 256), "i2_s", 2.0).unpack(), weight)


def test_saved_tensors_come_back() -> None:
    packed = pack_ternary(random_weight(20, 30), "t3w", scale=torch.rand(20))
    back = PackedTernary.from_tensors("w", packed.to_tensors("w"))
    assert (back.shape, back.format) == (packed.shape, packed.format)
    assert torch.equal(back.data, packed.data)
    assert torch.equal(back.scale, packed.scale)
    with pytest.raises(ValueError, match=r"w\.scale"):
        PackedTernary.from_tensors("w", {"w.ternary": packed.data})
    with pytest.raises(RuntimeError, match="magic"):
        PackedTernary.from_tensors("w", {"w.ternary": torch.zeros(100, dtype=torch.uint8), "w.scale": torch.ones(1)})


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pack_ternary(torch.full((2, 3), 2, dtype=torch.int8), "q2"), r"holds 2 at \[0, 0\]"),
        (lambda: pack_ternary(torch.zeros(2, 3), "q2"), r"weight has dtype Float"),
        (lambda: pack_ternary(torch.zeros(3, dtype=torch.int8), "q2"), r"\[N, K\]"),
        (lambda: pack_ternary(torch.zeros(2, 100, dtype=torch.int8), "i2_s"), r"multiple of 128.*K = 100"),
        (lambda: pack_ternary(torch.zeros(2, 128, dtype=torch.int8), "tq1_0"), r"multiple of 256.*K = 128"),
        (lambda: wrap_ternary(torch.zeros(31, dtype=torch.uint8), (1, 128), "i2_s"), r"31 bytes.*has 32"),
        (lambda: wrap_ternary(torch.full((32,), 255, dtype=torch.uint8), (1, 128), "i2_s"), r"no ternary value at"),
        (lambda: wrap_ternary(torch.full((2,), 250, dtype=torch.uint8), (1, 10), "t5"), r"no ternary value at"),
    ],
)
def test_what_cannot_be_packed_is_refused(call, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        call()


def test_scales_and_formats_are_checked() -> None:
    weight = torch.zeros(4, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="3 values, needed 1 or N = 4"):
        pack_ternary(weight, "q2", scale=torch.ones(3))
    with pytest.raises(ValueError, match="'q9'"):
        pack_ternary(weight, "q9")
