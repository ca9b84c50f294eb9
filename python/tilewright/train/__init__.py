# SPDX-License-Identifier: Apache-2.0
"""Training: one loop with resumable runs, FSDP2 and sequence parallelism."""

from __future__ import annotations

from tilewright.train.checkpoint import TrainingCheckpointError
from tilewright.train.config import TrainConfig
from tilewright.train.distributed import Parallel, shard
from tilewright.train.losses import Loss, mean_loss, regression_loss, token_accuracy, token_loss
from tilewright.train.sequence_parallel import sequence_parallel, sequence_parallel_linear_attention
from tilewright.train.trainer import Result, Trainer, TrainingError

__all__ = [
    "Loss",
    "Parallel",
    "Result",
    "TrainConfig",
    "Trainer",
    "TrainingCheckpointError",
    "TrainingError",
    "mean_loss",
    "regression_loss",
    "sequence_parallel",
    "sequence_parallel_linear_attention",
    "shard",
    "token_accuracy",
    "token_loss",
]
