# SPDX-License-Identifier: Apache-2.0
"""The decode step of a whole model as one CUDA graph: Llama-3-8B's layers (a few of them) with random INT4 weights."""

from __future__ import annotations

import math

import torch

from bench.cuda.cases import GpuCase, Methods
from tilewright.formats import Int4Weight
from tilewright.models.config import LlamaConfig
from tilewright.models.cuda_engine import CudaEngine
from tilewright.models.language_model import LanguageModel, Weight, expected_shapes, linear_names

GROUP = 128
HELD = 1000  # tokens of context


def config(layers: int) -> LlamaConfig:
    """Llama-3-8B with fewer layers and a vocabulary of 32,000."""
    return LlamaConfig("llama", 32000, 4096, 14336, layers, 32, 8, 128, 8192, rope_theta=5e5, tie_word_embeddings=True)


def model(layers: int) -> LanguageModel:
    """Random weights: time does not depend on them."""
    c, generator = config(layers), torch.Generator().manual_seed(0)
    weights: dict[str, Weight] = {}
    linears = set(linear_names(c))
    for name, shape in expected_shapes(c).items():
        if name in linears:
            codes = torch.randint(17, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, generator=generator)
            codes = torch.where(codes % 16 == 0, codes + 1, codes)  # no code for -8: the fast form
            scales = torch.full((shape[0], shape[1] // GROUP), 0.004, dtype=torch.bfloat16)
            weights[name] = Int4Weight(codes, scales, None, shape, GROUP)
        else:
            weights[name] = torch.randn(shape, generator=generator).mul(0.02).to(torch.bfloat16)
    return LanguageModel(c, weights, source="random")


def _decode(layers: int, batch: int, kv_bits: int) -> Methods:
    engine = CudaEngine(model(layers), 8192, batch, kv_bits=kv_bits)
    tokens = [torch.randint(0, 32000, (HELD,)).tolist() for _ in range(batch)]
    engine.prefill(tokens)
    engine.step([1] * batch)
    return {"tilewright": engine.replay}


def cases() -> list[GpuCase]:
    """Decode at one and many sequences."""
    found = []
    for batch in (1, 16):
        c = config(4)
        shapes = expected_shapes(c)
        linears = sum(math.prod(shapes[name]) for name in linear_names(c))
        weights = int(linears * (0.5 + 2 / GROUP)) + 2 * c.vocab_size * c.hidden_size
        cache = batch * c.num_hidden_layers * 2 * HELD * c.num_key_value_heads * (c.head_dim // 2 + 2)
        name = f"engine decode, 4 layers of Llama-3-8B, batch {batch}, {HELD} tokens held"
        operations = 2.0 * batch * (linears + c.vocab_size * c.hidden_size)
        found.append(
            GpuCase(
                name,
                lambda batch=batch: _decode(4, batch, 4),  # type: ignore[misc]
                weights + cache,
                operations,
                peak="fp8",
                note="one replay of the captured step; positions advance, so the context grows by a few hundred tokens",
            )
        )
    return found
