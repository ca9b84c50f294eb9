# SPDX-License-Identifier: Apache-2.0
"""Rows of activations that need not fit memory: read in blocks, in order or shuffled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tilewright.capture import ActivationStore

BLOCK = 1024
BUFFER = 1 << 16


class Rows:
    """Activations [n, d] from a tensor (also one mapped from a file) or a :class:`~tilewright.capture.ActivationStore`.

    name: the store's point; its only one if not given. skip: leave out each sequence's first positions (attention
    sinks); a store's rows know theirs. keep: boolean [n], rows to use. transform: applied to each block of rows.
    A row may be of any float dtype; blocks come out in float32.

    Raises:
        ValueError: not [n, d]; a name or skip for a tensor; no row is left.
    """

    def __init__(
        self,
        activations: Tensor | ActivationStore,
        name: str | None = None,
        *,
        skip: int = 0,
        keep: Tensor | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        block: int = BLOCK,
    ) -> None:
        tokens = None
        if not isinstance(activations, Tensor):
            tokens = activations.tokens
            if name is None and len(activations.names) > 1:
                raise ValueError(
                    f"the store holds {len(activations.names)} points; name one of {activations.names[:4]}"
                )
            activations = activations[activations.names[0] if name is None else name]
        elif name is not None:
            raise ValueError(f"name={name!r} names a point of a store, but activations is a tensor; leave it out")
        if activations.dim() != 2 or not activations.is_floating_point():
            raise ValueError(
                f"activations has shape {list(activations.shape)} and dtype {activations.dtype}; "
                "floats [n, d] are needed"
            )
        if skip and tokens is None:
            raise ValueError(f"skip={skip}: positions are known only for a store of sequences; pass keep instead")
        if skip and tokens is not None:
            late = tokens[:, 1] >= skip
            keep = late if keep is None else keep & late
        if keep is not None and keep.shape != (len(activations),):
            raise ValueError(f"keep has shape {list(keep.shape)}; [{len(activations)}] is needed")
        self.tokens = tokens if tokens is None or keep is None else tokens[keep]
        self._data, self._keep, self._transform, self._block = activations, keep, transform, block
        starts = range(0, len(activations), block)
        whole = [min(block, len(activations) - start) for start in starts]
        self._counts = whole if keep is None else [int(keep[start : start + block].sum()) for start in starts]
        if len(self) == 0:
            raise ValueError("no row of activations is left; lower skip, or give more")

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def width(self) -> int:
        """Size d of a row."""
        return self._data.shape[1]

    def read(self, number: int) -> Tensor:
        """Rows of one block: float32 [n, d].

        Raises:
            ValueError: a row holds NaN or an infinity; it is named.
        """
        part = slice(number * self._block, (number + 1) * self._block)
        rows = self._data[part]
        if self._keep is not None:
            rows = rows[self._keep[part]]
        rows = rows.to(torch.float32)
        finite = torch.isfinite(rows).all(1)
        if not bool(finite.all()):
            first = sum(self._counts[:number]) + int((~finite).int().argmax())
            raise ValueError(f"activations: token {first} holds NaN or infinite values; the model or file is damaged")
        return rows if self._transform is None else self._transform(rows)

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, in pieces."""
        for number, count in enumerate(self._counts):
            if count:
                yield self.read(number)

    def mapped(self, transform: Callable[[Tensor], Tensor]) -> Rows:
        """The same rows, each block changed by ``transform`` after what was there."""
        before = self._transform
        both = transform if before is None else lambda rows: transform(before(rows))
        return Rows(self._data, keep=self._keep, transform=both, block=self._block)

    def batches_per_epoch(self, size: int, seed: int, buffer: int = BUFFER) -> int:
        """Batches that the first epoch of :meth:`shuffled` has."""
        return sum(rows // size for _, rows in self._groups(size, seed, 0, buffer))

    def shuffled(self, size: int, seed: int, *, first: int = 0, buffer: int = BUFFER) -> Iterator[Tensor]:
        """Batches [size, d] without end: blocks in random order, rows shuffled among about ``buffer`` in memory.

        The sequence depends on seed, size and buffer alone; ``first`` begins it at that batch without reading those
        before. Rows that fill no batch of their group are left out, other ones in each epoch.

        Raises:
            ValueError: fewer rows than one batch.
        """
        if not 1 <= size <= len(self):
            raise ValueError(f"size={size}: from 1 to the {len(self)} rows that there are is needed; lower the batch")
        epoch = 0
        while True:
            for number, (group, count) in enumerate(self._groups(size, seed, epoch, buffer)):
                batches = count // size
                if first >= batches:
                    first -= batches
                    continue
                rows = torch.cat([self.read(block) for block in group])
                order = torch.randperm(count, generator=_generator(seed, epoch, number + 1))
                for some in order[first * size : batches * size].split(size):
                    yield rows[some]
                first = 0
            epoch += 1

    def _groups(self, size: int, seed: int, epoch: int, buffer: int) -> Iterator[tuple[list[int], int]]:
        """Blocks that are in memory together, and their rows; each group fills a batch."""
        left = len(self)
        group: list[int] = []
        count = 0
        for block in torch.randperm(len(self._counts), generator=_generator(seed, epoch, 0)).tolist():
            group.append(block)
            count += self._counts[block]
            left -= self._counts[block]
            if count >= max(size, buffer) and left >= size:
                yield group, count
                group, count = [], 0
        if count >= size:
            yield group, count


def _generator(*numbers: int) -> torch.Generator:
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(mixed)
