# SPDX-License-Identifier: Apache-2.0
"""Running one sequence through the C interface that llama.cpp and its relatives share."""

from __future__ import annotations

from typing import Any

import numpy as np


class LlamaFamily:
    """Greedy decoding over `api`, an object with the library's `llama_*` functions; see `protocol.Runner`."""

    api: Any
    context: Any
    vocabulary: int
    position: int

    def clear(self) -> None:
        """Empty the library's cache."""
        raise AttributeError(f"{type(self).__name__} must say how its library empties the cache")

    def reset(self) -> None:
        """Forget all tokens."""
        self.clear()
        self.position = 0

    def prefill(self, tokens: list[int]) -> int:
        """Append tokens; the most likely next one."""
        self._decode(tokens, every=False)
        return int(self._row(-1).argmax())

    def step(self, token: int) -> int:
        """Append one token; the most likely next one."""
        return self.prefill([token])

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [len(tokens), vocabulary] of a sequence of its own."""
        self.reset()
        self._decode(tokens, every=True)
        return np.stack([self._row(index).copy() for index in range(len(tokens))])

    def _row(self, index: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, index), (self.vocabulary,))

    def _decode(self, tokens: list[int], every: bool) -> None:
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, self.position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or i == len(tokens) - 1
            code = self.api.llama_decode(self.context, batch)
        finally:
            self.api.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode ended with code {code} at position {self.position}")
        self.position += len(tokens)
