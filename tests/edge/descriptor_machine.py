# SPDX-License-Identifier: Apache-2.0
"""The accelerator seen from its registers and memory, made of the contract's functions: what RTL is compared with."""

from __future__ import annotations

import numpy as np

from tilewright.edge import contract as c
from tilewright.edge.program import BYTES, ENTER, NORM, Buffer, Descriptor, Op, decode
from tilewright.edge.rtl import ID, Register

BUILD = {
    "G": 3, "T": 28, "Q": 16, "P": 4, "Lanes": 16, "Banks": 1, "WeightWords": 12800, "RowBeatsMax": 256,
    "BlocksMax": 49, "BeatsMax": 256, "RowsMax": 64, "HeadsMax": 32, "KvHeadsMax": 32, "HeadBeatsMax": 16,
    "AttentionBeatsMax": 128,
}  # fmt: skip


def machine(**build: int) -> type[Machine]:
    """A machine of another build."""
    return type("Machine", (Machine,), {"parameters": BUILD | build})


class Machine:
    """Registers as `_host.Accelerator`'s, a run at a time; rows go to memory as the sequencer's would."""

    parameters = BUILD

    def __init__(self, memory: np.ndarray, base: int) -> None:
        self.memory, self.base = memory, base
        self.registers = {int(Register.ID): ID}

    def read(self, offset: int) -> int:
        return self.registers.get(offset, 0)

    def write(self, offset: int, value: int) -> None:
        if offset == Register.STATUS:
            value = self.read(offset) & ~value
        self.registers[offset] = value

    def long(self, register: int) -> int:
        return self.read(register) | self.read(register + 4) << 32

    def run(self, _limit: int) -> int:
        status = c.StatusRegister()
        self.quantized: tuple[np.ndarray, np.ndarray] | None = None
        at, count = self.long(Register.PROGRAM), 0
        while True:
            one = decode(self.bytes(at, BYTES).view(np.int32).reshape(1, 16))[0]
            at, count = at + BYTES, count + 1
            if one.op == Op.END:
                break
            (self.linear if one.op == Op.LINEAR else self.attend)(one, status)
        self.registers[Register.STATUS] = self.read(Register.STATUS) | int(status.value)
        self.registers[Register.DESCRIPTORS] = count
        return 0

    def bytes(self, address: int, count: int) -> np.ndarray:
        assert self.base <= address <= address + count <= self.base + len(self.memory), "outside memory"
        return self.memory[address - self.base : address - self.base + count]

    def stride(self, width: int) -> int:
        return -(-width // self.parameters["Lanes"]) * self.parameters["Lanes"] * 2

    def rows(self, buffer: int, first: int, count: int, width: int, layer: int = 0) -> np.ndarray:
        """float16 `[count, padded width]`, memory's own; of a cache from position first + count - 1 down."""
        stride, at = self.stride(width), self.long(Register.BUFFERS + 8 * buffer)
        if buffer in (Buffer.KEYS, Buffer.VALUES):
            capacity = self.read(Register.CAPACITY)
            first = layer * capacity + capacity - first - count
        return self.bytes(at + first * stride, count * stride).view(np.float16).reshape(count, -1)

    def linear(self, one: Descriptor, status: c.StatusRegister) -> None:
        tokens, first = self.read(Register.TOKENS), self.read(Register.FIRST)
        tiling = c.Tiling(*(self.parameters[name] for name in ("G", "T", "Q")))
        stream = self.bytes(self.long(Register.WEIGHTS) + one.address, one.beats * 96).reshape(-1, 96)
        norms = one.inputs if one.flags & NORM else 0
        weights, norm = c.weights_of(stream, one.outputs, one.inputs, tiling, norms)
        if one.flags & ENTER:
            x = self.rows(one.source, 0, tokens, one.inputs)
            assert not x[:, one.inputs :].any(), "padding of a row is zero"
            x = x[:, : one.inputs]
            if norms:
                x, largest = c.rms_max(x, norm, c.rows.NormConstants(one.inputs, one.eps), status)
            else:
                largest = c.row_max(x, status)
            self.quantized = c.quantize(x, largest, status)
        q, scale = self.quantized
        mode, size = c.FUSE_MODES[one.mode], one.heads[2]
        side = None
        if mode == "rope":
            stride = self.stride(size)
            angles = self.bytes(self.long(Register.ANGLES) + first * stride, tokens * stride).view(np.int16)
            side = angles.reshape(tokens, -1)[:, :size].reshape(tokens, size // 2, 2)
        elif one.side != Buffer.NONE:
            side = self.rows(one.side, 0, tokens, one.outputs)[:, : one.outputs]
        y = c.dequant_fuse(c.tlmm(q, weights), scale, c.Factor(one.mantissa, one.exponent), mode, side, status)
        cache = one.target in (Buffer.KEYS, Buffer.VALUES)
        target = self.rows(one.target, first if cache else 0, tokens, one.outputs, one.layer)
        target[:] = 0
        target[:, : one.outputs] = y[::-1] if cache else y

    def attend(self, one: Descriptor, status: c.StatusRegister) -> None:
        tokens, first = self.read(Register.TOKENS), self.read(Register.FIRST)
        heads, kv_heads, size = one.heads
        q = self.rows(one.source, 0, tokens, heads * size).reshape(tokens, heads, size)
        k, v = (
            self.rows(buffer, 0, first + tokens, kv_heads * size, one.layer)[::-1].reshape(-1, kv_heads, size)
            for buffer in (Buffer.KEYS, Buffer.VALUES)
        )
        factor = c.Factor(one.mantissa, one.exponent)
        mixed = c.attention(q, k, v, first=first, factor=factor, status=status)
        self.rows(one.target, 0, tokens, heads * size)[:] = mixed.reshape(tokens, -1)
