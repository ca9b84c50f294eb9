# SPDX-License-Identifier: Apache-2.0
"""Tokens sorted by memory and back, without atomics in either direction."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.nn.mom.routing import NOWHERE


@dataclass(frozen=True)
class Dispatch:
    """The rows of a mixture: one per (token, slot) that goes somewhere, by memory, then sequence, then time.

    One memory of one sequence is a segment of consecutive rows, memory m of sequence n the segment `m * N + n`, so that
    a grouped product over memories and a packed recurrence over segments read the same rows.

    tokens: B * T. slots: k. order: int64 `[R]`, the row's place `token * k + slot`. cu_seqlens: int64 `[M N + 1]`, the
    rows before each segment; segments may be empty. sizes: rows of each memory, on the host.
    """

    tokens: int
    slots: int
    num_memories: int
    num_sequences: int
    order: Tensor
    cu_seqlens: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, indices: Tensor, num_memories: int, cu_seqlens: Tensor | None = None) -> Dispatch:
        """Sort the slots of `indices` `[B, T, k]` (-1: nowhere) stably; with `cu_seqlens` `[N + 1]` B is 1.

        The sizes are the only thing copied to the host, once.

        Raises:
            ValueError: indices is not an integer tensor of three dimensions, a value is not in -1..M-1, or cu_seqlens
                comes with B other than 1 or does not run from 0 to T.
        """
        if indices.dim() != 3 or indices.is_floating_point():
            raise ValueError(
                f"indices has shape {list(indices.shape)} and dtype {indices.dtype}, needed integers [B, T, k]"
            )
        sequences, of_token = _sequences(indices, cu_seqlens)
        segments = num_memories * sequences
        keys = indices * sequences + of_token[..., None]
        keys = torch.where(indices == NOWHERE, segments, keys)
        keys = torch.where((indices < NOWHERE) | (indices >= num_memories), segments + 1, keys).flatten()
        ranked, order = torch.sort(keys, stable=True)
        # entry s: rows with a key below s; the last two tell rows that go nowhere from rows out of range
        bounds = torch.searchsorted(ranked, torch.arange(segments + 2, device=keys.device))
        ends = bounds[sequences : segments + 1 : sequences] if sequences else bounds[:0]
        *stops, known = torch.cat([ends, bounds[-1:]]).tolist()
        if known != keys.numel():
            raise ValueError(f"indices holds a memory out of range; needed 0 to {num_memories - 1}, or -1 for none")
        stops = [0, *stops] if sequences else [0] * (num_memories + 1)
        sizes = tuple(b - a for a, b in itertools.pairwise(stops))
        batch, length, slots = indices.shape
        return cls(
            batch * length,
            slots,
            num_memories,
            sequences,
            order[: stops[-1]],
            bounds[: segments + 1].contiguous(),
            sizes,
        )

    def gather(self, x: Tensor) -> Tensor:
        """Per token `[tokens, ...]` to rows `[R, ...]`; a token's gradient is the sum over its slots in their order."""
        rows: Tensor = _Rows.apply(x, self.order, self.slots)
        return rows

    def permute(self, x: Tensor) -> Tensor:
        """Per slot `[tokens * k, ...]` to rows `[R, ...]`."""
        rows: Tensor = _Rows.apply(x, self.order, 1)
        return rows

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """`sum_j w_j o_j` over a token's slots in their order: `[R, ...]`, weights `[tokens, k]` to `[tokens, ...]`.

        The sum is formed in the wider of the two dtypes and has the dtype of rows.
        """
        places: Tensor = _Places.apply(rows, self.order, self.tokens * self.slots)
        reads = places.unflatten(0, (self.tokens, self.slots)).unbind(1)
        shares = weights.reshape(self.tokens, self.slots, *[1] * (rows.dim() - 1)).unbind(1)
        total = reads[0] * shares[0]
        for read, share in zip(reads[1:], shares[1:], strict=True):
            total = total + read * share
        return total.to(rows.dtype)

    def split_state(self, state: Tensor) -> Tensor:
        """Per sequence `[N, M, ...]` to per segment `[M N, ...]`."""
        return state.transpose(0, 1).flatten(0, 1)

    def join_state(self, state: Tensor) -> Tensor:
        """Per segment `[M N, ...]` to per sequence `[N, M, ...]`."""
        return state.unflatten(0, (self.num_memories, self.num_sequences)).transpose(0, 1).contiguous()

    def states(self) -> Tensor:
        """For every row, `sequence * M + memory`: its place in states `[N, M, ...]` seen as `[N M, ...]`."""
        segments = torch.arange(self.num_memories * self.num_sequences, device=self.order.device)
        rows = torch.repeat_interleave(segments, self.cu_seqlens.diff(), output_size=self.order.numel())
        return rows % self.num_sequences * self.num_memories + rows // self.num_sequences


def _sequences(indices: Tensor, cu_seqlens: Tensor | None) -> tuple[int, Tensor]:
    """The number of sequences and the sequence of every token, `[B, T]`."""
    batch, length, _ = indices.shape
    if cu_seqlens is None:
        return batch, torch.arange(batch, device=indices.device)[:, None].expand(batch, length)
    if batch != 1 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} with B = {batch}; needed [N + 1] with the sequences packed "
            "into B = 1"
        )
    steps = cu_seqlens.to("cpu")
    if steps[0] != 0 or steps[-1] != length or bool((steps.diff() < 0).any()):
        raise ValueError(f"cu_seqlens = {steps.tolist()}; needed a rising list from 0 to T = {length}")
    places = torch.arange(length, device=indices.device)
    of_token = torch.searchsorted(cu_seqlens.to(places.dtype), places, right=True) - 1
    return cu_seqlens.numel() - 1, of_token[None]


class _Rows(torch.autograd.Function):
    """x [n, ...] -> x[order // slots]; every place `token * slots + slot` occurs at most once in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.tokens, ctx.slots = x.shape[0], slots
        return x.index_select(0, order if slots == 1 else order // slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        places = _Places.apply(grads[0], order, ctx.tokens * ctx.slots)
        return places.unflatten(0, (ctx.tokens, ctx.slots)).sum(1), None, None


class _Places(torch.autograd.Function):
    """rows [R, ...] -> [places, ...] with row r at order[r], zeros where no row goes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(order)
        return rows.new_zeros(places, *rows.shape[1:]).index_copy_(0, order, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _Rows.apply(grads[0], order, 1), None, None
