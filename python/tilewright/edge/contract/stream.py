# SPDX-License-Identifier: Apache-2.0
"""The weight stream in external memory, and where its index vectors go in the weight buffer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract.half import Half, as_half
from tilewright.edge.contract.weights import Tiling, TlmmWeights

BEAT_BITS = 768
NORM_BITS = 16


def vectors_per_beat(tiling: Tiling, beat_bits: int = BEAT_BITS) -> int:
    """Index vectors in a beat beside one float16 norm weight.

    Raises:
        ValueError: not even one fits.
    """
    count = (beat_bits - NORM_BITS) // tiling.vector_bits
    if count < 1:
        raise ValueError(
            f"a beat of {beat_bits} bits holds no vector of {tiling.vector_bits} bits and a norm weight; reduce t"
        )
    return count


def beat_count(weights: TlmmWeights, norms: int = 0, beat_bits: int = BEAT_BITS) -> int:
    """Beats of the stream of one matrix: as many as its vectors need, or ``norms`` norm weights, one in each."""
    return max(-(-weights.vectors // vectors_per_beat(weights.tiling, beat_bits)), norms)


def beats_of(weights: TlmmWeights, norm: Half | None = None, beat_bits: int = BEAT_BITS) -> NDArray[np.uint8]:
    """The stream of one matrix: uint8 `[beats, beat_bits / 8]`, little-endian bit order.

    A beat holds vectors v, v + 1, ... from bit 0 on, each vector_bits wide, and above them, from bit vectors_per_beat *
    vector_bits on, the next float16 norm weight. Vectors go block by block, within a block output by output. There are
    as many beats as vectors or norm weights need; what is left over is zero bits, which the loader does not read.
    """
    tiling = weights.tiling
    count = vectors_per_beat(tiling, beat_bits)
    values = np.zeros(0, np.float16) if norm is None else as_half(norm, "norm")
    beats = beat_count(weights, len(values), beat_bits)
    flags = (weights.indices.reshape(-1, tiling.t, 1) >> np.arange(tiling.index_bits, dtype=np.uint8)) & 1
    vectors = np.zeros((beats * count, tiling.vector_bits), np.uint8)
    vectors[: weights.vectors] = flags.reshape(weights.vectors, -1)
    bits = np.zeros((beats, beat_bits), np.uint8)
    bits[:, : count * tiling.vector_bits] = vectors.reshape(beats, -1)
    norms = np.unpackbits(values.view(np.uint8).reshape(-1, 2), axis=-1, bitorder="little")
    bits[: len(values), count * tiling.vector_bits :][:, :NORM_BITS] = norms
    return np.packbits(bits, axis=-1, bitorder="little")


def weights_of(
    beats: NDArray[np.uint8], outputs: int, inputs: int, tiling: Tiling, norms: int = 0
) -> tuple[TlmmWeights, Half]:
    """What a loader makes of a stream: the weights and ``norms`` norm weights.

    Raises:
        ValueError: the stream is shorter or longer than the matrix needs.
    """
    count = vectors_per_beat(tiling, beats.shape[1] * 8)
    shape = (tiling.blocks(inputs), tiling.padded_outputs(outputs))
    vectors = shape[0] * shape[1]
    needed = max(-(-vectors // count), norms)
    if len(beats) != needed:
        raise ValueError(
            f"weights_of: {len(beats)} beats, needed {needed} for {outputs} x {inputs} and {norms} norm weights"
        )
    bits = np.unpackbits(beats, axis=-1, bitorder="little")
    used = bits[:, : count * tiling.vector_bits].reshape(-1, tiling.t, tiling.index_bits)[:vectors]
    indices = (used << np.arange(tiling.index_bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    tail = np.packbits(bits[:norms, count * tiling.vector_bits :][:, :NORM_BITS], axis=-1, bitorder="little")
    return TlmmWeights(indices.reshape(*shape, tiling.t), outputs, inputs, tiling), tail.copy().view(
        np.float16
    ).reshape(-1)


def buffer_place(block: int, output: int, outputs: int, tiling: Tiling) -> tuple[int, int]:
    """(bank, word) of an index vector: max(q / 2, 1) banks of two ports each, so that q neighbours are one cycle.

    The address is linear, block * padded_outputs + output, for square, wide and tall matrices alike: vectors come in
    that order, so the loader only counts, and since padded_outputs is a multiple of q each read is aligned.
    """
    address = block * tiling.padded_outputs(outputs) + output
    banks = max(tiling.q // 2, 1)
    return address % banks, address // banks


def paper_place(row: int, column: int, width: int, ffn: int, tiling: Tiling, *, tall: bool) -> tuple[int, int]:
    """(bank, word) after the paper's three-dimensional view [ceil(ffn' / width')][width' / (T G)][width], zero-based.

    Args:
        row: input. column: output. width: d_model. tall: the matrix has ffn inputs and width outputs.
    """
    blocks = tiling.blocks(width)
    padded = blocks * tiling.block
    if row >= (ffn if tall else width) or column >= (width if tall else max(ffn, width)):
        raise ValueError(f"paper_place: ({row}, {column}) is outside the matrix")
    outer = row // padded if tall else column // width
    address = (outer * blocks + row % padded // tiling.block) * width + column % width
    banks = max(tiling.q // 2, 1)
    return address % banks, address // banks
