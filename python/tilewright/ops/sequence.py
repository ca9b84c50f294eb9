# SPDX-License-Identifier: Apache-2.0
"""Where an operator learns that it sees only a piece of its sequences, and what it can ask the other pieces for.

Sequence parallelism (``tilewright.train.sequence_parallel``) puts a piece here for the time of a forward and backward
pass. Operators with a state hand their call to it; layers that look at earlier tokens ask it for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor

StateResult = tuple[Tensor, "Tensor | None"]
Operator = Callable[..., StateResult]


class SequencePiece(Protocol):
    """This process' stretch of time among those that hold the same rows, in order. All methods are differentiable."""

    def offset(self, tokens: int) -> int:
        """Position of the piece's first token, when each piece has so many."""

    def before(self, x: Tensor, count: int) -> Tensor:
        """The ``count`` tokens before this piece, [B, count, ...]; zeros before the sequence. x: [B, T, ...]."""

    def until_here(self, x: Tensor) -> Tensor:
        """The tokens of all pieces up to and including this one, [B, offset + T, ...]. x: [B, T, ...]."""

    def linear_attention(self, engine: Operator, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> StateResult:
        """The operator over the whole sequences: output of this piece, final state of the last one."""

    def hgrn(self, engine: Operator, x: Tensor, g: Tensor, **options: Any) -> StateResult:
        """The element-wise recurrence over the whole sequences: output of this piece, final state of the last one."""


_piece: SequencePiece | None = None


def piece() -> SequencePiece | None:
    """The piece in force; None when sequences are whole."""
    return _piece


@contextlib.contextmanager
def use_piece(chosen: SequencePiece | None) -> Iterator[None]:
    """Put a piece in force inside the block."""
    global _piece
    before, _piece = _piece, chosen
    try:
        yield
    finally:
        _piece = before
