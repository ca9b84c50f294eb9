# SPDX-License-Identifier: Apache-2.0
"""tilewright's own engine on any checkpoint that it loads."""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewright import doctor
from tilewright.formats import quantize_int4
from tilewright.models import LanguageModel, LlamaConfig, load, save
from tilewright.models.engine import Engine, SamplingConfig
from tilewright.models.language_model import expected_shapes

GREEDY = SamplingConfig()


def _touch_code() -> None:
    """Take a model of a few kilobytes through the same code, so that the pages of libraries that loading and running
    bring in are there before a model's memory is counted."""
    config = LlamaConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    weights: dict[str, Any] = {}
    for name, shape in expected_shapes(config).items():
        values = torch.ones(shape)
        weights[name] = quantize_int4(values, 32) if "proj" in name else values
    with tempfile.TemporaryDirectory() as folder:
        path = save(LanguageModel(config, weights), Path(folder) / "model", tokenizer=False)
        for act in ("int8", "fp8"):
            for kv_bits in (4, 16):
                engine = Engine(load(path), max_length=48, act=act, kv_bits=kv_bits, release=True)
                GREEDY.choose(engine.step(GREEDY.choose(engine.prefill([1] * 40), 0)[0]), 1)


_touch_code()


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
