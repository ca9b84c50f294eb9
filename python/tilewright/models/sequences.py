# SPDX-License-Identifier: Apache-2.0
"""Generation with whatever appends tokens to sequences and gives logits: sampling, prompts in blocks, stopping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tilewright.models.config import LlamaConfig
from tilewright.ops import engine as ops

BLOCK_TOKENS = 512
"""Tokens of prompt that one call takes: enough to reuse each weight often, few enough to keep the workspace small."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable token (the lowest id among equals).
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: of those keep the fewest whose probabilities reach p, at least one.
        seed: the same seed gives the same text, at any batch size and number of threads.
        max_new_tokens: where generation ends without a stop token; None: where the engine's max_length is reached.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}, needed a number >= 0 (0 is greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}, needed >= 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}, needed a number in (0, 1]")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}, needed a 64-bit integer")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}, needed >= 1")

    def choose(self, logits: Tensor, step: int) -> list[int]:
        """Next tokens from float logits `[S, vocabulary]`; ``step`` counts a sequence's generated tokens."""
        chosen = ops.sample(logits.cpu(), self.temperature, self.top_k, self.top_p, self.seed, step)
        return cast("list[int]", chosen.tolist())


class SequenceEngine(ABC):
    """A model and the memory of ``batch`` sequences of up to ``max_length`` tokens.

    Attributes:
        config: the model's architecture.
        max_length, batch: tokens that a sequence can hold; sequences.
        recurrent_layers: layers that sum their tokens up in a state; a sequence cannot be cut back then.
    """

    def __init__(self, config: LlamaConfig, max_length: int, batch: int, recurrent_layers: int = 0) -> None:
        if batch < 1:
            raise ValueError(f"{type(self).__name__}: batch = {batch}, needed at least 1")
        self.config, self.max_length, self.batch = config, max_length, batch
        self.recurrent_layers = recurrent_layers
        self._held: list[list[int]] = [[] for _ in range(batch)]

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens that each sequence holds."""

    @abstractmethod
    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first ``lengths[s]`` tokens of each sequence.

        Raises:
            RuntimeError: a sequence does not hold that many, or is recurrent and would keep some but not all.
        """

    @abstractmethod
    def forward(self, tokens: Sequence[Sequence[int]], all_logits: bool = False) -> Tensor:
        """Append tokens to every sequence, in one call.

        Args:
            tokens: one list for each sequence, possibly empty.

        Returns:
            float32 `[batch, vocabulary]`: logits behind each sequence's last token, zeros for an empty list; or
            `[T, vocabulary]` behind all of them, sequence after sequence.

        Raises:
            RuntimeError: a token is outside the vocabulary, or a sequence grows beyond max_length; nothing is appended.
            ValueError: there are more or fewer lists than sequences.
        """

    def reset(self) -> None:
        """Forget all tokens."""
        self.truncate([0] * self.batch)

    def what_can_be_kept(self, lengths: Sequence[int]) -> list[int]:
        """Of ``lengths[s]`` first tokens of each sequence, those that :meth:`truncate` can keep.

        A recurrent state is of use for all of its tokens or for none.
        """
        if not self.recurrent_layers:
            return list(lengths)
        return [wanted if wanted == held else 0 for wanted, held in zip(lengths, self.lengths, strict=True)]

    def prefill(self, prompts: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Append prompts of any length in blocks; logits `[batch, vocabulary]` behind the last token of each.

        Args:
            prompts: token ids for the only sequence, or one non-empty list for each.

        Raises:
            ValueError: a prompt is empty, or does not fit max_length; nothing is appended.
        """
        lists = self._per_sequence(prompts)
        self._require_room([len(ids) for ids in lists], "prompt")
        result: Tensor | None = None
        done = [0] * self.batch
        while any(done[s] < len(ids) for s, ids in enumerate(lists)):
            room, block = BLOCK_TOKENS, []
            for s, ids in enumerate(lists):
                block.append(ids[done[s] : done[s] + room])
                room -= len(block[s])
                done[s] += len(block[s])
            logits = self.forward(block)
            if result is None:
                result = logits
            for s in range(self.batch):
                if block[s]:
                    result[s] = logits[s]
        assert result is not None
        return result

    def step(self, tokens: int | Sequence[int | None]) -> Tensor:
        """Append one token to each sequence (None: none); logits `[batch, vocabulary]`."""
        each: Sequence[int | None] = [tokens] if isinstance(tokens, int) else tokens
        return self.forward([[] if token is None else [token] for token in each])

    def logits(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """float32 `[T, vocabulary]` at every position of a text of its own; sequence 0 holds it afterwards.

        Raises:
            ValueError: the text is empty or longer than max_length.
        """
        ids = [int(i) for i in (tokens.flatten().tolist() if isinstance(tokens, Tensor) else tokens)]
        self.truncate([0, *self.lengths[1:]])
        others: list[list[int]] = [[] for _ in range(self.batch - 1)]
        self._require_room([len(ids), *([0] * (self.batch - 1))], "text")
        blocks = [ids[at : at + BLOCK_TOKENS] for at in range(0, len(ids), BLOCK_TOKENS)]
        return torch.cat([self.forward([block, *others], all_logits=True) for block in blocks])

    def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingConfig | None = None,
        *,
        max_new_tokens: int | None = None,
        stop_tokens: Collection[int] | None = None,
        reuse: bool = False,
    ) -> Iterator[int]:
        """Stream the tokens that follow a prompt; a stop token is the last one given.

        Args:
            prompt: token ids, at least one.
            sampling: greedy when None.
            max_new_tokens: instead of the sampling's limit.
            stop_tokens: instead of the model's end-of-text tokens; empty: none.
            reuse: start from what sequence 0 still holds of the same beginning (the next turn of a conversation).

        Raises:
            ValueError: the prompt is empty, or prompt and new tokens exceed max_length.
        """
        if self.batch != 1:
            raise ValueError(f"{type(self).__name__}: batch = {self.batch}; use generate_batch()")
        for (token,) in self._generate(
            [prompt], sampling, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, reuse=reuse
        ):
            assert token is not None
            yield token

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | None = None,
        *,
        max_new_tokens: int | None = None,
        stop_tokens: Collection[int] | None = None,
    ) -> Iterator[list[int | None]]:
        """Stream one token for each of ``batch`` prompts, of different lengths if need be; None for one that has ended.

        Each text is what the prompt gives alone. Arguments and errors as for :meth:`generate`.
        """
        lists = [list(prompt) for prompt in prompts]
        yield from self._generate(lists, sampling, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, reuse=False)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | None,
        *,
        max_new_tokens: int | None,
        stop_tokens: Collection[int] | None,
        reuse: bool,
    ) -> Iterator[list[int | None]]:
        sampling = sampling or SamplingConfig()
        count = sampling.max_new_tokens if max_new_tokens is None else max_new_tokens
        stop = frozenset(self.config.eos_token_ids if stop_tokens is None else stop_tokens)
        lists = self._per_sequence(prompts)
        kept = self._keep_common(lists) if reuse else self._keep_nothing()
        # The last token is given out, never appended.
        longest = max(len(ids) for ids in lists)
        count = max(self.max_length - longest + 1, 1) if count is None else count
        added = [len(ids) - had + max(count - 1, 0) for ids, had in zip(lists, kept, strict=True)]
        self._require_room(added, "prompt and new tokens")
        self._held = [list(ids) for ids in lists]
        logits = self.prefill([ids[had:] for ids, had in zip(lists, kept, strict=True)])
        live = [True] * self.batch
        for index in range(count):
            tokens = self._choose(logits, sampling, index, live)
            yield tokens
            live = [token is not None and token not in stop for token in tokens]
            if not any(live) or index + 1 == count:
                return
            fed = [token if alive else None for token, alive in zip(tokens, live, strict=True)]
            logits = self.step(fed)
            for held, token in zip(self._held, fed, strict=True):
                held += [] if token is None else [token]

    def _choose(self, logits: Tensor, sampling: SamplingConfig, index: int, live: list[bool]) -> list[int | None]:
        rows = [s for s, alive in enumerate(live) if alive]
        chosen = sampling.choose(logits if len(rows) == self.batch else logits[rows], index)
        tokens: list[int | None] = [None] * self.batch
        for s, token in zip(rows, chosen, strict=True):
            tokens[s] = token
        return tokens

    def _keep_nothing(self) -> list[int]:
        self.reset()
        return [0] * self.batch

    def _keep_common(self, prompts: list[list[int]]) -> list[int]:
        """Cut every sequence back to what it shares with its prompt, short of the prompt's last token."""
        kept = []
        for ids, had, length in zip(prompts, self._held, self.lengths, strict=True):
            most = min(len(ids) - 1, len(had), length)
            kept.append(next((i for i in range(most) if ids[i] != had[i]), max(most, 0)))
        kept = self.what_can_be_kept(kept)
        self.truncate(kept)
        return kept

    def _per_sequence(self, prompts: Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
        nested = [prompts] if len(prompts) == 0 or isinstance(prompts[0], int) else prompts
        lists = [list(ids) for ids in cast("Sequence[Sequence[int]]", nested)]
        if len(lists) != self.batch:
            raise ValueError(f"Engine: {len(lists)} prompts, this engine has batch = {self.batch}")
        if not all(lists):
            raise ValueError(
                "Engine: a prompt is empty; give at least one token, the model's beginning-of-text for example"
            )
        return lists

    def _require_room(self, added: Sequence[int], what: str) -> None:
        for s, (held, more) in enumerate(zip(self.lengths, added, strict=True)):
            if held + more > self.max_length:
                before = f"{held} tokens held and " if held else ""
                raise ValueError(
                    f"Engine: sequence {s}: {before}{more} of {what} exceed max_length = {self.max_length}; shorten "
                    f"the prompt, ask for fewer new tokens, or make the engine with a larger max_length (the model's "
                    f"limit is {self.config.max_position_embeddings})"
                )
