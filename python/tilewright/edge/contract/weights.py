# SPDX-License-Identifier: Apache-2.0
"""Ternary weights as the accelerator stores them, and the table-lookup product (arXiv 2510.15926)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilewright.edge.contract.half import Int
from tilewright.edge.contract.status import Status, StatusRegister

Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Tiling:
    """Parameters of a build.

    Attributes:
        g: inputs in one base-3 index.
        t: indices in one vector, so that a vector covers t * g inputs of one output.
        q: outputs computed each cycle.
        p: queries that prefill attention holds.
        lanes: width of the element-wise streams, in values.
    """

    g: int = 3
    t: int = 28
    q: int = 16
    p: int = 4
    lanes: int = 16

    def __post_init__(self) -> None:
        for name, low, high in (("g", 1, 5), ("t", 1, 128), ("q", 1, 256), ("p", 1, 64), ("lanes", 1, 64)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"Tiling: {name} = {value}, needed {low} to {high}")

    @property
    def codes(self) -> int:
        return 3**self.g

    @property
    def index_bits(self) -> int:
        return (self.codes - 1).bit_length()

    @property
    def vector_bits(self) -> int:
        return self.t * self.index_bits

    @property
    def block(self) -> int:
        """Inputs of one index vector."""
        return self.t * self.g

    @property
    def zero_index(self) -> int:
        """The index of g zeros, which pads."""
        return (self.codes - 1) // 2

    def blocks(self, inputs: int) -> int:
        return -(-inputs // self.block)

    def padded_outputs(self, outputs: int) -> int:
        return -(-outputs // self.q) * self.q


@dataclass(frozen=True)
class TlmmWeights:
    """A ternary matrix as index vectors.

    Attributes:
        indices: uint8 `[blocks, padded outputs, t]`; digit d of an index (weight w + 1) is input ``d`` of its group,
            least significant first. Padded inputs and outputs hold the index of zeros.
        outputs, inputs: the matrix's own shape.
    """

    indices: NDArray[np.uint8]
    outputs: int
    inputs: int
    tiling: Tiling

    @property
    def vectors(self) -> int:
        return self.indices.shape[0] * self.indices.shape[1]

    def words(self) -> NDArray[np.uint64]:
        """`[blocks, padded outputs, ceil(t * bits / 64)]`: index 0 in the lowest bits of the first word."""
        bits = self.tiling.index_bits
        count = -(-self.tiling.vector_bits // 64)
        flags = (self.indices[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
        flat = flags.reshape(*self.indices.shape[:2], -1)
        padded = np.zeros((*flat.shape[:2], count * 64), np.uint8)
        padded[..., : flat.shape[-1]] = flat
        return np.packbits(padded, axis=-1, bitorder="little").view("<u8").reshape(*flat.shape[:2], count)

    @classmethod
    def from_words(cls, words: NDArray[np.uint64], outputs: int, inputs: int, tiling: Tiling) -> TlmmWeights:
        """The inverse of :meth:`words`.

        Raises:
            ValueError: the shape of ``words`` is not that of such a matrix.
        """
        shape = (tiling.blocks(inputs), tiling.padded_outputs(outputs), -(-tiling.vector_bits // 64))
        if words.shape != shape:
            raise ValueError(f"from_words: words has shape {words.shape}, needed {shape} for {outputs} x {inputs}")
        flags = np.unpackbits(np.ascontiguousarray(words, "<u8").view(np.uint8), axis=-1, bitorder="little")
        used = flags[..., : tiling.vector_bits].reshape(*shape[:2], tiling.t, tiling.index_bits)
        indices = (used << np.arange(tiling.index_bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
        return cls(indices, outputs, inputs, tiling)

    def unpack(self) -> Int8:
        """int8 `[outputs, inputs]` of -1, 0, 1 (an index beyond 3**g as zeros)."""
        digits = digit_table(self.tiling)
        values = digits[self.indices].reshape(*self.indices.shape[:2], -1)
        return values.transpose(1, 0, 2).reshape(values.shape[1], -1)[: self.outputs, : self.inputs]


def digit_table(tiling: Tiling) -> Int8:
    """int8 `[2**bits, g]`: the weights each index stands for; zeros for the indices that stand for none."""
    table = np.zeros((1 << tiling.index_bits, tiling.g), np.int8)
    for digits in itertools.product(range(3), repeat=tiling.g):
        table[sum(d * 3**i for i, d in enumerate(digits))] = np.array(digits) - 1
    return table


def pack_tlmm(weight: Int8, tiling: Tiling | None = None) -> TlmmWeights:
    """Encode int8 `[outputs, inputs]` of -1, 0, 1.

    Raises:
        ValueError: another dtype or rank, an empty side, or a value that is not ternary.
    """
    tiling = tiling or Tiling()
    weight = np.asarray(weight)
    if weight.dtype != np.int8 or weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"pack_tlmm: weight is {weight.dtype} {weight.shape}, needed int8 [outputs, inputs], none of them 0"
        )
    wrong = (weight < -1) | (weight > 1)
    if wrong.any():
        row, column = (int(i[0]) for i in wrong.nonzero())
        raise ValueError(
            f"pack_tlmm: weight[{row}, {column}] = {weight[row, column]}, needed -1, 0 or 1: quantize_ternary rounds"
        )
    outputs, inputs = weight.shape
    blocks, padded = tiling.blocks(inputs), tiling.padded_outputs(outputs)
    digits = np.ones((padded, blocks * tiling.block), np.uint8)
    digits[:outputs, :inputs] = weight + 1
    powers = (3 ** np.arange(tiling.g)).astype(np.uint8)
    indices = (digits.reshape(padded, blocks, tiling.t, tiling.g) * powers).sum(-1, dtype=np.uint8)
    return TlmmWeights(np.ascontiguousarray(indices.transpose(1, 0, 2)), outputs, inputs, tiling)


def tlmm(x: Int8, weights: TlmmWeights, status: StatusRegister | None = None) -> Int32:
    """int8 `[tokens, inputs]` times the weights: int32 `[tokens, outputs]`, exact.

    By tables as the hardware does it: of each group of g activations the 3**g sums, then one look-up a group.

    Raises:
        ValueError: x has another dtype or another number of columns.
    """
    x = np.asarray(x)
    if x.dtype != np.int8 or x.ndim != 2 or x.shape[1] != weights.inputs:
        raise ValueError(f"tlmm: x is {x.dtype} {x.shape}, needed int8 [tokens, {weights.inputs}]")
    tiling = weights.tiling
    if status is not None:
        status.set(Status.BAD_INDEX, (weights.indices >= tiling.codes).any())
    blocks = weights.indices.shape[0]
    padded = np.zeros((x.shape[0], blocks * tiling.block), np.int32)
    padded[:, : x.shape[1]] = x
    digits = digit_table(tiling).astype(np.int32)
    out = np.zeros((x.shape[0], weights.indices.shape[1]), np.int32)
    for block in range(blocks):
        part = padded[:, block * tiling.block : (block + 1) * tiling.block].reshape(-1, tiling.t, tiling.g)
        tables = part @ digits.T
        for group in range(tiling.t):
            out += tables[:, group, weights.indices[block, :, group]]
    return out[:, : weights.outputs]


def accumulate(x: Int8, weight: Int8) -> Int:
    """What :func:`tlmm` must equal: int8 `[tokens, inputs]` times int8 `[outputs, inputs]` transposed, in int64."""
    return x.astype(np.int64) @ weight.astype(np.int64).T
