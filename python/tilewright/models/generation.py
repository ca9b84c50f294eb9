# SPDX-License-Identifier: Apache-2.0
"""transformers' ``generate()`` at the speed of the native engine: the same tokens as ``Engine.generate``."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tilewright.models.engine import BLOCK_TOKENS, Engine
from tilewright.models.hf import generation_defaults
from tilewright.models.hf_names import cache_name
from tilewright.models.image import Activation, ModelImage
from tilewright.models.language_model import LanguageModel


class EngineCache(Cache):
    """The memory of one :class:`Engine` as a transformers cache.

    It counts padded positions, as transformers does; the engine holds the real tokens only. Rows are
    reordered (beam search) by keeping what old and new row share and computing the rest again: all of it in a
    linearized model, whose states cannot be cut back.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(layers=[])
        self.engine, self.seen = engine, 0
        self.held: list[list[int]] = [[] for _ in range(engine.batch)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions given so far, padding included."""
        del layer_idx
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that each sequence can hold."""
        del layer_idx
        return self.engine.max_length

    def update(self, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not for this cache: the engine writes its own keys and values."""
        raise TypeError("EngineCache: only an EngineForCausalLM can write to it; use Int4KVCache with other models")

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.engine.reset()
        self.seen, self.held = 0, [[] for _ in self.held]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i hold what row beam_idx[i] held."""
        self._become([list(self.held[i]) for i in beam_idx.tolist()])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` positions (all of them tokens, no padding)."""
        if tokens_to_remove > 0:
            raise ValueError(f"EngineCache.crop: {tokens_to_remove}, needed 0 or the negative number of tokens")
        count = -tokens_to_remove
        if any(len(row) < count for row in self.held):
            raise ValueError(
                f"EngineCache.crop: {count} tokens to remove, the shortest row holds {min(map(len, self.held))}"
            )
        self._become([row[: len(row) - count] for row in self.held])
        self.seen -= count

    def _become(self, wanted: list[list[int]]) -> None:
        shared = [_common(had, new) for had, new in zip(self.held, wanted, strict=True)]
        kept = self.engine.what_can_be_kept(shared)
        self.engine.truncate(kept)
        rest = [new[had:] for new, had in zip(wanted, kept, strict=True)]
        if any(rest):
            self._append(rest)
        self.held = wanted

    def extend(self, rows: list[list[int]], positions: int) -> Tensor:
        """Append one list of tokens to each row; logits [batch, vocabulary] behind the last of each."""
        logits = self._append(rows)
        self._remember(rows, positions)
        return logits

    def extend_with_all_logits(self, rows: list[list[int]], positions: int) -> list[Tensor]:
        """The same, with the logits [tokens, vocabulary] behind every token of each row."""
        found = []
        for index, row in enumerate(rows):
            blocks = [row[at : at + BLOCK_TOKENS] for at in range(0, len(row), BLOCK_TOKENS)] or [[]]
            alone = [[block if i == index else [] for i in range(len(rows))] for block in blocks]
            found.append(torch.cat([self.engine.forward(lists, all_logits=True) for lists in alone]))
        self._remember(rows, positions)
        return found

    def _append(self, rows: list[list[int]]) -> Tensor:
        if all(rows):
            return self.engine.prefill(rows)
        return self.engine.forward(rows)

    def _remember(self, rows: list[list[int]], positions: int) -> None:
        self.seen += positions
        for held, row in zip(self.held, rows, strict=True):
            held += row


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


class EngineForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose forward pass is the native engine.

    Everything of ``generate()`` that needs only logits works: sampling, streamers, stopping criteria, logits
    processors, batches with padding, beams. There are no torch parameters and no gradients.

    Args:
        model: a loaded model, or an image made by :func:`tilewright.models.image.compile`.
        max_length: tokens that a sequence can hold; the model's limit when None.
        act, kv_bits: formats of activations and cache, as for :class:`Engine`.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(
        self,
        model: LanguageModel | ModelImage,
        max_length: int | None = None,
        *,
        act: Activation | None = None,
        kv_bits: int | None = None,
    ) -> None:
        super().__init__(AutoConfig.for_model(**model.config.to_transformers()))
        first = Engine(model, max_length, act=act, kv_bits=kv_bits)
        self.image, self.max_length = first.image, first.max_length
        self._engines: list[tuple[Engine, weakref.ref[EngineCache]]] = []
        generation_defaults(self, self.image.config)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where inputs belong: the engine runs on the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def new_cache(self, batch: int) -> EngineCache:
        """An empty cache for ``batch`` sequences; memory of a cache that nobody holds any more is used again."""
        for index, (engine, owner) in enumerate(self._engines):
            if owner() is None and engine.batch == batch:
                engine.reset()
                cache = EngineCache(engine)
                self._engines[index] = (engine, weakref.ref(cache))
                return cache
        self._engines = [(e, owner) for e, owner in self._engines if owner() is not None]
        cache = EngineCache(Engine(self.image, self.max_length, batch))
        self._engines.append((cache.engine, weakref.ref(cache)))
        return cache

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits behind the given tokens.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, positions so far + T], zero at padding, or None.
            past_key_values, cache: an EngineCache, or an empty cache of another kind, which is replaced by one; the
                older and the newer name of one argument.
            logits_to_keep: 1 for those of the last position only, 0 for all.

        Returns:
            logits float32 [B, T or 1, vocabulary] (zeros at padding), and the cache unless use_cache is False.

        Raises:
            ValueError: an argument of transformers' models that the engine cannot follow is given.
        """
        del return_dict
        _refuse(kwargs)
        given = past_key_values if cache is None else cache
        if given is not None and not isinstance(given, EngineCache) and given.get_seq_length() > 0:
            raise ValueError(f"EngineForCausalLM: {cache_name()} is a filled {type(given).__name__}; pass none")
        held = given if isinstance(given, EngineCache) else self.new_cache(input_ids.shape[0])
        if held.engine.batch != input_ids.shape[0]:
            raise ValueError(f"EngineForCausalLM: {input_ids.shape[0]} rows, the cache holds {held.engine.batch}")
        mask = _real_tokens(input_ids, attention_mask)
        rows = [ids[keep].tolist() for ids, keep in zip(input_ids, mask, strict=True)]
        if logits_to_keep == 1 and bool(mask[:, -1].all()):
            logits = held.extend(rows, input_ids.shape[1])[:, None]
        else:
            logits = torch.zeros(*input_ids.shape, self.image.config.vocab_size)
            for out, keep, found in zip(
                logits, mask, held.extend_with_all_logits(rows, input_ids.shape[1]), strict=True
            ):
                out[keep] = found
            logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        states: dict[str, Any] = {cache_name(): held} if use_cache else {}
        return CausalLMOutputWithPast(logits=logits, **states)

    def save_pretrained(self, *_args: Any, **_kwargs: Any) -> None:
        """Refused: the engine holds compiled weights; :func:`tilewright.models.save` writes the model itself."""
        raise TypeError(
            "EngineForCausalLM: compiled weights are not saved; use tilewright.models.save(model, directory)"
        )


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """bool [B, T]: which of the given positions are tokens."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.dim() != 2 or attention_mask.shape[1] < input_ids.shape[1]:
        raise ValueError(
            f"EngineForCausalLM: attention_mask has shape {list(attention_mask.shape)}, needed [B, at least "
            f"{input_ids.shape[1]}] with a zero at each padding position"
        )
    return attention_mask[:, -input_ids.shape[1] :].bool()


def _refuse(arguments: dict[str, Any]) -> None:
    """position_ids and cache_position follow from the mask; anything else that is set would be ignored silently."""
    known = ("position_ids", "cache_position", "next_sequence_length", "output_attentions", "output_hidden_states")
    for name, value in arguments.items():
        if (name not in known and value is not None) or (name.startswith("output_") and value):
            raise ValueError(
                f"EngineForCausalLM: {name} is not supported; use tilewright.models.to_transformers(model)"
            )
