# SPDX-License-Identifier: Apache-2.0
"""tilewright's own engine on any checkpoint that it loads."""

from __future__ import annotations

import importlib.metadata
import math
from typing import Any

import numpy as np
import torch

from tilewright import doctor
from tilewright.models import checkpoint, load  # noqa: F401  imported here, so that its memory is not counted as the model's
from tilewright.models.engine import Engine, SamplingConfig

GREEDY = SamplingConfig()


class Runner:
    """`act` and `kv_bits` as for the engine; what the checkpoint says where they are None."""

    def __init__(self, model: str, threads: int, max_length: int, act: Any = None, kv_bits: int | None = None) -> None:
        torch.set_num_threads(threads)
        loaded = load(model)
        self.parameters = sum(math.prod(weight.shape) for weight in loaded.weights.values())
        self.engine = Engine(loaded, max_length=max_length, act=act, kv_bits=kv_bits, release=True)

    def facts(self) -> dict[str, Any]:
        return {
            "bytes": self.engine.image.nbytes,
            "bits_per_weight": 8 * self.engine.image.nbytes / self.parameters,
            "cache_bytes": self.engine.state_nbytes,
            "library": f"tilewright {importlib.metadata.version('tilewright')}, torch {torch.__version__}",
            "isa": doctor.isa()["active"],
        }

    def reset(self) -> None:
        self.engine.reset()

    def prefill(self, tokens: list[int]) -> int:
        return GREEDY.choose(self.engine.prefill(tokens), 0)[0]

    def step(self, token: int) -> int:
        return GREEDY.choose(self.engine.step(token), 0)[0]

    def logits(self, tokens: list[int]) -> np.ndarray:
        return self.engine.logits(tokens).numpy()
