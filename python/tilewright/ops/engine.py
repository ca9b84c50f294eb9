# SPDX-License-Identifier: Apache-2.0
"""The decode engine and sampling as operators. Native code: csrc/engine, csrc/ops/sampling.

`tilewright.models.engine.Engine` is the convenient form of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright import _native

_native.require()
_ops = torch.ops.tilewright


def engine_arena(nbytes: int) -> Tensor:
    """An uninitialised uint8 `[nbytes]` for weights, on large pages where the system grants them."""
    arena: Tensor = _ops.engine_arena(nbytes)
    return arena


def engine_checksum(program: Tensor) -> int:
    """The number that a program's header must hold: FNV-1a over all words but that one."""
    checksum: int = _ops.engine_checksum(program)
    return checksum


def engine_state(program: Tensor, weights: Tensor, sequences: int, max_length: int) -> Tensor:
    """An empty state: uint8, KV cache and lengths of `sequences` sequences of up to `max_length` tokens.

    Raises:
        RuntimeError: program and weights are damaged or do not belong together, or a number is out of range.
    """
    state: Tensor = _ops.engine_state(program, weights, sequences, max_length)
    return state


def engine_lengths(state: Tensor) -> Tensor:
    """int64 `[sequences]`: tokens that each sequence holds."""
    lengths: Tensor = _ops.engine_lengths(state)
    return lengths


def engine_truncate_(state: Tensor, lengths: Tensor) -> None:
    """Cut every sequence back to its first `lengths[s]` tokens, in place.

    Raises:
        RuntimeError: a length is negative or more than the sequence holds.
    """
    _ops.engine_truncate_(state, lengths)


def engine_forward(
    program: Tensor, weights: Tensor, state: Tensor, tokens: Tensor, cu_seqlens: Tensor, all_logits: bool = False
) -> Tensor:
    """Append packed tokens to a state and compute their logits.

    Args:
        program, weights: of a `ModelImage`.
        state: from `engine_state`, changed in place.
        tokens: int64 `[T]`; sequence s owns `tokens[cu_seqlens[s] : cu_seqlens[s + 1]]`, possibly none.
        cu_seqlens: int64 or int32 `[sequences + 1]`, from 0 to T.
        all_logits: logits of all tokens, not only of each sequence's last one.

    Returns:
        float32 `[sequences, vocabulary]` (zeros for a sequence without tokens), or `[T, vocabulary]`. The same bits for
        a token in whatever block, batch and number of threads it is computed.

    Raises:
        RuntimeError: an arena is damaged or belongs to another model, a token is outside the vocabulary, or a sequence
            would exceed its length. The sequences are then as before.
    """
    logits: Tensor = _ops.engine_forward(program, weights, state, tokens, cu_seqlens, all_logits)
    return logits


def sample(
    logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, step: int = 0
) -> Tensor:
    """The next token of every row: int64 `[S]` from logits `[S, vocabulary]`; -inf excludes a token.

    Softmax of logits / temperature, cut to the `top_k` most probable tokens (0: all), then to the fewest whose
    probabilities reach `top_p` of those. Temperature 0 is greedy: the lowest index among equals. The random number
    depends on `seed` and `step` alone (Philox), so a text does not depend on its neighbours in a batch.

    Raises:
        RuntimeError: logits hold NaN or +inf, every logit of a row is -inf, or an option is out of range.
    """
    tokens: Tensor = _ops.sample(logits, temperature, top_k, top_p, seed, step)
    return tokens


@torch.library.register_fake("tilewright::engine_forward")
def _(program: Tensor, weights: Tensor, state: Tensor, tokens: Tensor, cu_seqlens: Tensor, all_logits: bool) -> Tensor:
    del weights, state
    width = torch.library.get_ctx().new_dynamic_size()
    rows = tokens.shape[0] if all_logits else cu_seqlens.shape[0] - 1
    return program.new_empty((rows, width), dtype=torch.float32)


@torch.library.register_fake("tilewright::engine_lengths")
def _(state: Tensor) -> Tensor:
    return state.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


@torch.library.register_fake("tilewright::engine_truncate_")
def _(state: Tensor, lengths: Tensor) -> None:
    del state, lengths


@torch.library.register_fake("tilewright::sample")
def _(logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, step: int) -> Tensor:
    del temperature, top_k, top_p, seed, step
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)
