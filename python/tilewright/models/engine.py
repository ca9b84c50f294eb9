# SPDX-License-Identifier: Apache-2.0
"""Generation with the native decode engine: one operator call for each block of prompt or step of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tilewright.models.image import Activation, CacheFormat, ModelImage, compile
from tilewright.models.language_model import LanguageModel
from tilewright.models.sequences import BLOCK_TOKENS, SamplingConfig, SequenceEngine
from tilewright.ops import engine as ops

__all__ = ["BLOCK_TOKENS", "Engine", "EngineSnapshot", "SamplingConfig", "decided_formats"]

_LONGEST = 2**31 - 1
_CACHES: dict[int, CacheFormat] = {4: "int4", 16: "bf16"}


@dataclass(frozen=True)
class EngineSnapshot:
    """What the sequences of an :class:`Engine` held at some moment."""

    state: Tensor
    held: tuple[tuple[int, ...], ...]


class Engine(SequenceEngine):
    """A compiled model and the memory of ``batch`` sequences of up to ``max_length`` tokens, allocated once.

    A token's logits are the same bits whichever block, batch or number of threads (``torch.set_num_threads``) it is
    computed in.

    In a linearized model layers sum their tokens up in a state of constant size: a sequence can then not be cut back,
    only forgotten, or restored from a :meth:`snapshot`; and where all layers are such, max_length costs no memory and
    may exceed the model's limit.

    Args:
        model: an image, or a loaded model to compile.
        max_length: tokens that a sequence can hold; the model's limit when None.
        batch: sequences.
        act: "int8", "fp8" or "fp8-fold"; None: what the model's quantizer decided, else "int8". Not with an image.
        kv_bits: 4 or 16; None: what the model's quantizer decided, else 16. Not with an image.
        release: empty ``model.weights`` while compiling, so that no second copy is held. The model cannot be used
            afterwards, its tokenizer can.

    Raises:
        ValueError: an option is out of range, or max_length is beyond the model's limit.
    """

    def __init__(
        self,
        model: ModelImage | LanguageModel,
        max_length: int | None = None,
        batch: int = 1,
        *,
        act: Activation | None = None,
        kv_bits: int | None = None,
        release: bool = False,
    ) -> None:
        recurrent = model.recurrent_layers if isinstance(model, ModelImage) else len(model.mixers)
        super().__init__(model.config, _length(model, max_length), batch, recurrent)
        if isinstance(model, LanguageModel):
            image = compile(model, *decided_formats(model, act, kv_bits), release=release)
        elif act is None and kv_bits is None:
            image = model
        else:
            raise ValueError("Engine: act and kv_bits are decided when an image is compiled; pass them to compile()")
        self.image = image
        self._state = ops.engine_state(image.program, image.weights, batch, self.max_length)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence holds."""
        return cast("list[int]", ops.engine_lengths(self._state).tolist())

    @property
    def state_nbytes(self) -> int:
        """Bytes of KV cache and book-keeping."""
        return self._state.numel()

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep the first ``lengths[s]`` tokens of each sequence.

        Raises:
            RuntimeError: a sequence does not hold that many, or is recurrent and would keep some but not all.
        """
        ops.engine_truncate_(self._state, torch.tensor(list(lengths), dtype=torch.int64))

    def snapshot(self) -> EngineSnapshot:
        """A copy of what all sequences hold, to go back to: for a recurrent model the only way, and a cheap one."""
        return EngineSnapshot(self._state.clone(), tuple(tuple(held) for held in self._held))

    def restore(self, snapshot: EngineSnapshot) -> None:
        """Make all sequences what they were at a :meth:`snapshot` of this engine.

        Raises:
            ValueError: the snapshot is of an engine of another model, length or batch.
        """
        if snapshot.state.shape != self._state.shape or not torch.equal(snapshot.state[:48], self._state[:48]):
            raise ValueError("Engine: the snapshot is of an engine with another model, max_length or batch")
        self._state.copy_(snapshot.state)
        self._held = [list(held) for held in snapshot.held]

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
        if len(tokens) != self.batch:
            raise ValueError(f"Engine: tokens for {len(tokens)} sequences, this engine has batch = {self.batch}")
        offsets = [0]
        for ids in tokens:
            offsets.append(offsets[-1] + len(ids))
        packed = torch.tensor([token for ids in tokens for token in ids], dtype=torch.int64)
        return ops.engine_forward(
            self.image.program, self.image.weights, self._state, packed, torch.tensor(offsets), all_logits
        )


def _length(model: ModelImage | LanguageModel, wanted: int | None) -> int:
    """The max_length of an engine, checked."""
    own = model.config.max_position_embeddings
    recurrent = model.recurrent_layers if isinstance(model, ModelImage) else len(model.mixers)
    constant = recurrent == model.config.num_hidden_layers
    limit = _LONGEST if constant else own
    length = own if wanted is None else wanted
    if not 1 <= length <= limit:
        whose = "the most that an engine counts" if constant else "the model's limit"
        raise ValueError(f"Engine: max_length = {wanted}, needed 1 .. {limit}, {whose}")
    return length


def decided_formats(
    model: LanguageModel, act: Activation | None, kv_bits: int | None
) -> tuple[Activation, CacheFormat]:
    """Activations and cache: what is given, else what the model's quantizer decided, else "int8" and bfloat16."""
    decided = model.settings
    if act is None:
        act = decided.get("activations", "int8")
        if act == "fp8" and decided.get("mode") == "fold":
            act = "fp8-fold"
    bits = decided.get("kv_bits", 16) if kv_bits is None else kv_bits
    if bits not in _CACHES:
        raise ValueError(f"kv_bits = {bits}, needed 4 or 16")
    return act, _CACHES[bits]
