# SPDX-License-Identifier: Apache-2.0
"""A trained hybrid model as the command line's engine: logits of a text, and tokens one by one."""

from __future__ import annotations

from typing import Any

from tilewright.linearize.runner import Runner
from tilewright.models.hybrid import HybridLanguageModel


class HybridRunner(Runner):
    """One sequence of up to ``max_length`` tokens. Linear layers hold a state of constant size, softmax layers a cache.

    Raises:
        ValueError: max_length is beyond the model's limit.
    """

    def __init__(self, loaded: HybridLanguageModel, max_length: int) -> None:
        limit = loaded.config.max_position_embeddings
        if not 1 <= max_length <= limit:
            raise ValueError(f"HybridRunner: max_length = {max_length}, needed 1 .. {limit}, the model's limit")
        self.model, self.max_length = loaded.model, max_length
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        from tilewright.nn import MixerCache

        self.cache: Any = MixerCache()
        self.held: list[int] = []
