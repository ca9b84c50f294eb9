# SPDX-License-Identifier: Apache-2.0
"""Examples in tensors, dealt in batches by step: every example once an epoch, in an order of that epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.data.recall import mix


@dataclass(frozen=True)
class Epochs:
    """Batches of stored examples: ``epochs(step)`` is a tuple with the same rows of each tensor.

    Each epoch has ``examples // batch`` batches of a permutation made from (seed, epoch); the rest of an epoch is left
    out. A batch is a function of the step, so a resumed run sees what it would have seen.

    tensors: [N, ...] each.
    """

    tensors: tuple[Tensor, ...]
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = [len(tensor) for tensor in self.tensors]
        if len(set(sizes)) != 1 or not 1 <= self.batch <= sizes[0]:
            raise ValueError(
                f"tensors of {sizes} rows and batch={self.batch}: equal lengths of at least a batch needed"
            )

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return len(self.tensors[0]) // self.batch

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """The batch of one step."""
        epoch, place = divmod(step, self.steps)
        random = torch.Generator().manual_seed(mix(self.seed, epoch))
        rows = torch.randperm(len(self.tensors[0]), generator=random)[place * self.batch : (place + 1) * self.batch]
        return tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors)
