# SPDX-License-Identifier: Apache-2.0
"""Sparse autoencoders on a model's activations: TopK, BatchTopK and JumpReLU, trained from a store, SAELens' files."""

from __future__ import annotations

from tilewright.inspect.sae.codes import Codes, Support
from tilewright.inspect.sae.config import SAEConfig
from tilewright.inspect.sae.files import load_sae, save_sae
from tilewright.inspect.sae.module import SAE, BatchTopKSAE, JumpReLUSAE, TopKSAE
from tilewright.inspect.sae.rows import Rows
from tilewright.inspect.sae.trainer import SAETrainer, geometric_median, make_sae

__all__ = [
    "SAE",
    "BatchTopKSAE",
    "Codes",
    "JumpReLUSAE",
    "Rows",
    "SAEConfig",
    "SAETrainer",
    "Support",
    "TopKSAE",
    "geometric_median",
    "load_sae",
    "make_sae",
    "save_sae",
]
