# SPDX-License-Identifier: Apache-2.0
"""Real text and a real model: corpora shipped in the package, SmolLM2-135M-Instruct fetched once into a cache,
a small ternary model in the package."""

from __future__ import annotations

from tilewright.data.models import SMOLLM2_NAME, smollm2_gguf, ternary_model
from tilewright.data.paths import cache_dir
from tilewright.data.text import CORPORA, PARTS, corpus, fetch_encyclopedia

__all__ = [
    "CORPORA",
    "PARTS",
    "SMOLLM2_NAME",
    "cache_dir",
    "corpus",
    "fetch_encyclopedia",
    "smollm2_gguf",
    "ternary_model",
]
