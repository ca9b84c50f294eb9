# SPDX-License-Identifier: Apache-2.0
"""What each process of the distributed tests runs: torchrun parallel_worker.py OUTPUT_FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from trainees import VOCABULARY, SequenceModel

from tilewright.data.recall import Stream, multi_query_recall
from tilewright.train import Parallel, TrainConfig, Trainer
from tilewright.train.trainer import Result

STREAM = Stream(multi_query_recall, 4, 1, {"length": 16, "pairs": 4, "vocabulary": VOCABULARY, "queries": 3})
# eps far above rounding errors of gradients: the step is then a smooth function of them.
CONFIG = TrainConfig(steps=6, lr=1e-2, eps=1e-3, accumulate=2, clip=0.5, schedule="constant")
KINDS = {"fsdp": {}, "replicated": {"fsdp": False}, "sequence": {"sequence": 2}}


def train(
    parallel: Parallel, dtype: torch.dtype, directory: Path | None = None, steps: int = 6
) -> tuple[Result, SequenceModel, Trainer]:
    """Train the small model of these tests; the same call in one process is the expectation."""
    torch.manual_seed(parallel.rank)  # unlike everywhere: the trainer must make the weights equal
    model = SequenceModel(seed=parallel.rank).to(dtype)
    config = TrainConfig(**{**CONFIG.to_dict(), "betas": CONFIG.betas, "steps": steps})
    trainer = Trainer(model, STREAM, config, parallel=parallel, directory=directory)
    return trainer.run(resume=directory is not None), model, trainer


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def main(output: Path) -> None:
    for kind, options in KINDS.items():
        parallel = Parallel.start(**options)
        for dtype in (torch.float32, torch.float64):
            result, model, trainer = train(parallel, dtype)
            found = {
                "losses": result.losses,
                "norms": [r["grad_norm"] for r in result.records],
                "weights": {name: full(value) for name, value in model.state_dict().items()},
                "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
                "undecayed": sum(p.numel() for p in trainer.optimizer.param_groups[1]["params"]),
            }
            torch.save(found, output / f"{kind}.{dtype}.{parallel.rank}".replace("torch.", ""))
    parallel = Parallel.start()
    result, _, _ = train(parallel, torch.float64, output / "from_one", 6)
    torch.save(result.losses, output / f"from_one.losses.{parallel.rank}")
    train(parallel, torch.float64, output / "to_one", 3)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
