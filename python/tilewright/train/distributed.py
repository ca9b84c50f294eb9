# SPDX-License-Identifier: Apache-2.0
"""Several processes: who holds which part of a batch, sharded parameters (FSDP2), sums over all.

Every process makes the whole batch of a step and keeps its piece, so a run draws the same data however many processes
there are. Gradients and counts are summed over all processes and divided once, so it has the same losses too, up to the
order of the sums.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Parallel:
    """The place of this process among ``world``; :meth:`start` finds it, the default is a single process.

    Args:
        sequence: processes that hold pieces of the same rows, each a stretch of time (sequence parallelism). The
            world is ``world / sequence`` such groups, each with other rows of the batch.
        fsdp: shard parameters, gradients and optimizer state over all processes; False keeps them whole everywhere.
        group: the process group of the pieces of this process' rows; None when ``sequence`` is 1.
    """

    rank: int = 0
    world: int = 1
    sequence: int = 1
    fsdp: bool = True
    group: Any = None

    @classmethod
    def start(cls, *, sequence: int = 1, fsdp: bool = True, backend: str | None = None) -> Parallel:
        """Join the processes that ``torchrun`` started; a single process where there is no torchrun.

        backend: nccl where CUDA is, gloo elsewhere. Raises `ValueError` when the world is no multiple of ``sequence``.
        """
        if not dist.is_initialized() and "RANK" in os.environ:
            dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        world = dist.get_world_size() if dist.is_initialized() else 1
        if sequence < 1 or world % sequence:
            raise ValueError(f"sequence={sequence}: a divisor of the {world} processes is needed")
        if world == 1:
            return cls(fsdp=False)
        rank = dist.get_rank()
        group = None
        if sequence > 1:
            # Every process must make every group.
            groups = [dist.new_group(list(range(first, first + sequence))) for first in range(0, world, sequence)]
            group = groups[rank // sequence]
        return cls(rank, world, sequence, fsdp, group)

    def piece(self, batch: Any) -> Any:
        """This process' part of a batch: rows along dimension 0, time along dimension 1.

        Raises `ValueError` when the rows or the tokens cannot be dealt out evenly.
        """
        if self.world == 1:
            return batch
        if isinstance(batch, (tuple, list)):
            return type(batch)(self.piece(item) for item in batch)
        if isinstance(batch, dict):
            return {name: self.piece(item) for name, item in batch.items()}
        if not isinstance(batch, Tensor) or batch.dim() == 0:
            return batch
        index, part = divmod(self.rank, self.sequence)
        batch = _deal(batch, 0, self.world // self.sequence, index, "rows")
        return batch if batch.dim() < 2 else _deal(batch, 1, self.sequence, part, "tokens")

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model for training here: sharded by FSDP2 in place, or with the weights of process 0 everywhere."""
        if self.world == 1:
            return model
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if not is_sharded(tensor):
                    dist.broadcast(tensor.detach(), 0)
        return shard(model) if self.fsdp else model

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum the gradients that FSDP has not summed already; a missing one counts as zero."""
        for parameter in parameters if self.world > 1 else ():
            if not is_sharded(parameter):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


def shard(model: nn.Module) -> nn.Module:
    """Shard a model's parameters over all processes: each block of a `ModuleList`, then the rest (FSDP2).

    Gradients are summed, not averaged. Returns the same model. A model that is sharded already is left as it is.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return model
    blocks = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    for module in [*reversed(blocks), model]:
        if not isinstance(module, FSDPModule) and any(True for _ in module.parameters()):
            fully_shard(module)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a piece of the tensor only (torch's DTensor, whose import takes a second)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value on the CPU, copied; every process must ask for a sharded one."""
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor() if is_sharded(tensor) else tensor
    return full.detach().to("cpu", copy=True)


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a full value into a tensor, or into this process' shard of it."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        value = distribute_tensor(value.to(target.device), sharded.device_mesh, sharded.placements)
    target.copy_(value)


def _deal(tensor: Tensor, dimension: int, parts: int, index: int, what: str) -> Tensor:
    size = tensor.shape[dimension]
    if size % parts:
        raise ValueError(
            f"a batch of {size} {what} (dimension {dimension}) cannot be dealt to {parts} processes; make it a multiple"
        )
    return tensor.narrow(dimension, index * (size // parts), size // parts)
