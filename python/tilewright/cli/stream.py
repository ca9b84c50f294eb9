# SPDX-License-Identifier: Apache-2.0
"""Tokens to text as they come: no half characters, stop strings found across tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

_UNFINISHED = "�"


class TextStream:
    """Feed token ids with `push`, print what it returns, print `finish()` at the end.

    decode: token ids -> text. stop: the first of these strings ends the text; it is not part of it.
    `stopped` tells that one was found; `text` is everything given out so far.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop string is empty; it would end every text before its first character")
        self.decode, self.stop = decode, tuple(stop)
        self.stopped, self.text = False, ""
        self._held = ""
        self._ids: list[int] = []
        self._settled = 0

    def push(self, token: int) -> str:
        """Text that became certain with this token; may be empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """What was held back."""
        return "" if self.stopped else self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        # A tokenizer may join or trim at a text's start, so the previous word is decoded along as context.
        before = self.decode(self._ids[: self._settled])
        now = self.decode(self._ids)
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not final):
            return ""
        context = self._ids[self._settled :]
        self._ids, self._settled = context, len(context)
        return now[len(before) :]

    def _release(self, new: str, final: bool) -> str:
        pending = self._held + new
        found = [at for at in (pending.find(text) for text in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            pending = pending[: min(found)]
        elif not final:
            keep = max((_overlap(pending, text) for text in self.stop), default=0)
            pending, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += pending
        return pending


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(tokens: Iterable[int], stream: TextStream) -> Iterator[str]:
    """Non-empty pieces of text from a stream of tokens; ends at a stop string."""
    for token in tokens:
        piece = stream.push(token)
        if piece:
            yield piece
        if stream.stopped:
            return
    piece = stream.finish()
    if piece:
        yield piece
