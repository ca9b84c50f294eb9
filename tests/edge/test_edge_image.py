# SPDX-License-Identifier: Apache-2.0
"""Images: what is read back computes the same bits; broken files are refused; descriptors are 64 bytes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from edge_inputs import POINTS, halves, small_layer

from tilewright.edge.contract import FUSE_MODES
from tilewright.edge.image import PAGE, compile_image, read_image
from tilewright.edge.model import EdgeModel
from tilewright.edge.program import BYTES, ENTER, Buffer, Descriptor, Op, decode, encode


@pytest.fixture
def model(rng: np.random.Generator) -> EdgeModel:
    layers = [small_layer(rng, POINTS[0], gate_map, norms) for gate_map, norms in (("silu", 4), ("squared_relu", 4))]
    embedding = halves(rng, 50, 24, spread=0.3)
    return EdgeModel(layers, embedding, halves(rng, 50, 24, spread=0.3), embedding[0] + 1, 1e-5, 5000.0, POINTS[0])


def test_the_image_computes_the_same_bits(model: EdgeModel, tmp_path: Path) -> None:
    manifest = compile_image(model, tmp_path / "image")
    image = read_image(tmp_path / "image")
    assert image.manifest == manifest
    tokens = [3, 1, 4, 1, 5]
    got, true = (one.session(capacity=9).hidden(tokens) for one in (image.model, model))
    assert np.array_equal(got, true)
    assert np.array_equal(image.model.head, model.head)
    ends = [(s["offset"], s["offset"] + s["bytes"]) for s in manifest["sections"].values()]
    assert all(start % PAGE == 0 for start, _ in ends)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends)), "sections do not overlap"


def test_the_program_of_a_layer(model: EdgeModel, tmp_path: Path) -> None:
    compile_image(model, tmp_path / "image")
    program = read_image(tmp_path / "image").program
    assert [one.op for one in program] == ([Op.LINEAR] * 3 + [Op.ATTEND] + [Op.LINEAR] * 4 + [Op.END]) * 2
    assert [bool(one.flags & ENTER) for one in program[:8]] == [True, False, False, False, True, True, False, True]
    assert program[1].target == Buffer.KEYS
    assert program[0].heads == (4, 2, 8)
    assert FUSE_MODES[program[15].mode] == "squared_relu"
    words = encode(program)
    assert words.nbytes == BYTES * len(program)
    assert decode(words) == program
    assert decode(encode([Descriptor(Op.LINEAR, exponent=-37)]))[0].exponent == -37
    with pytest.raises(ValueError, match="op = 9"):
        decode(encode([Descriptor(9)]))


def test_broken_images_are_refused(model: EdgeModel, tmp_path: Path) -> None:
    path = tmp_path / "image"
    compile_image(model, path)
    whole = path.read_bytes()
    for data, message in (
        (b"", "not an image"),
        (b"GGUF" + whole[4:], "not an image"),
        (whole[:-PAGE], "cut off or changed"),
        (whole[: len(whole) // 2] + b"\x55" + whole[len(whole) // 2 + 1 :], "cut off or changed"),
        (whole[:8] + b"\x07" + whole[9:], "version 7"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_image(path)


def test_a_tied_head_is_stored_once(model: EdgeModel, tmp_path: Path) -> None:
    tied = EdgeModel(model.layers, model.embedding, model.embedding, model.final_norm, 1e-5, 1e4, model.tiling)
    assert "head" not in compile_image(tied, tmp_path / "image")["sections"]
    assert np.array_equal(read_image(tmp_path / "image").model.head, model.embedding)
