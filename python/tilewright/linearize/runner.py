# SPDX-License-Identifier: Apache-2.0
"""Generation with a transformers model, one call a token, behind the interface of the decode engine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilewright.models.engine import SamplingConfig
from tilewright.models.hf_names import cache_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Runner:
    """One sequence of up to ``max_length`` tokens; with a linearized model what it holds does not grow.

    Raises:
        ValueError: max_length is beyond the model's limit.
    """

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        limit = int(model.config.max_position_embeddings)
        if not 1 <= max_length <= limit:
            raise ValueError(f"Runner: max_length = {max_length}, needed 1 .. {limit}, the model's limit")
        self.model, self.max_length = model.eval(), max_length
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()
        self.held: list[int] = []

    def forward(self, ids: Sequence[int], keep: int = 1) -> Tensor:
        """Append tokens; logits float32 [keep, vocabulary] behind the last ones (0: all).

        Raises:
            ValueError: no token, or more than fit.
        """
        if not ids or len(self.held) + len(ids) > self.max_length:
            raise ValueError(
                f"Runner: {len(ids)} tokens behind {len(self.held)} held; between 1 and max_length = "
                f"{self.max_length} in all are needed"
            )
        with torch.inference_mode():
            cache: dict[str, Any] = {cache_name(): self.cache}
            out: Any = self.model(torch.tensor([list(ids)]), use_cache=True, logits_to_keep=keep, **cache)
        self.held += ids
        return out.logits[0].float()

    def logits(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """float32 [T, vocabulary] at every position of a text of its own."""
        self.reset()
        return self.forward([int(i) for i in torch.as_tensor(tokens).flatten().tolist()], keep=0)

    def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingConfig | None = None,
        *,
        max_new_tokens: int | None = None,
        stop_tokens: Collection[int] | None = None,
        reuse: bool = False,
    ) -> Iterator[int]:
        """Stream the tokens that follow a prompt, as :meth:`tilewright.models.engine.Engine.generate`.

        reuse: go on from the state when the prompt begins with every token held (a state cannot be cut back).
        """
        sampling = sampling or SamplingConfig()
        count = sampling.max_new_tokens if max_new_tokens is None else max_new_tokens
        ids = list(prompt)
        count = self.max_length - len(ids) + 1 if count is None else count
        if len(ids) + count - 1 > self.max_length:
            raise ValueError(f"Runner: {len(ids)} tokens and {count} new ones exceed max_length = {self.max_length}")
        stop = self._ends() if stop_tokens is None else frozenset(stop_tokens)
        kept = len(self.held)
        if not reuse or kept >= len(ids) or ids[:kept] != self.held:
            self.reset()
            kept = 0
        logits = self.forward(ids[kept:])
        for index in range(count):
            (token,) = sampling.choose(logits, index)
            yield token
            if token in stop or index + 1 == count:
                return
            logits = self.forward([token])

    def _ends(self) -> frozenset[int]:
        defaults: Any = self.model.generation_config
        ends = defaults.eos_token_id
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
