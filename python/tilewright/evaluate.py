# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a language model over a text, by a sliding window.

Window and stride follow the usual convention (transformers' guide to perplexity of fixed-length
models): windows of ``window`` tokens start every ``stride`` tokens, and of each window only the tokens
that no earlier window scored count, predicted from everything before them in the window. So no token
is counted twice, every token but the first of the text is counted when ``stride < window``, and with
``stride == window`` the first token of each window, which has no context, is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tilewright._progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Logits = Callable[[Tensor], Any]
# Rows of logits turned to float64 at a time: 64 x 49152 x 8 B = 25 MB for SmolLM2.
_ROWS = 64


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats per token) over ``tokens`` scored tokens.

    ``stderr`` is the standard error of the mean NLL taking tokens as independent, so the perplexity
    is uncertain by about a factor exp(+-stderr). ``truncated`` says that the text was longer than used.
    """

    perplexity: float
    nll: float
    stderr: float
    tokens: int
    window: int
    stride: int
    truncated: bool


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) go through the model, of which [first, end) are scored."""

    start: int
    first: int
    end: int


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over ``length`` tokens; together they score each token at most once."""
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"window={window}, stride={stride}: need window >= 2 and 1 <= stride <= window")
    scored = 1
    for start in range(0, length, stride):
        end = min(start + window, length)
        first = max(scored, start + 1)
        if first < end:
            yield Window(start, first, end)
        scored = end
        if end == length:
            return


def token_nll(logits: Logits | nn.Module, tokens: Tensor, part: Window) -> Tensor:
    """Negative log-likelihood of each scored token of one window: float64 [end - first]."""
    with torch.no_grad():
        answer = logits(tokens[None, part.start : part.end])
    out: Any = getattr(answer, "logits", answer)
    out = out[0] if out.dim() == 3 else out
    if out.dim() != 2 or out.shape[0] != part.end - part.start:
        raise ValueError(
            f"logits returned shape {list(out.shape)} for {part.end - part.start} tokens; "
            f"[1, {part.end - part.start}, vocabulary] is needed"
        )
    rows = out[part.first - 1 - part.start : part.end - 1 - part.start]
    targets = tokens[part.first : part.end].to(rows.device)
    pieces = []
    for some, wanted in zip(rows.split(_ROWS), targets.split(_ROWS), strict=True):
        some = some.double()
        pieces.append(some.logsumexp(-1) - some.gather(-1, wanted[:, None])[:, 0])
    return torch.cat(pieces).cpu()


def perplexity(
    logits: Logits | nn.Module,
    tokens: Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: bool | None = None,
) -> Perplexity:
    """Perplexity of ``tokens`` (integers [T], T >= 2).

    logits: a function from tokens [1, t] to logits [1, t, V] (or [t, V], or an object with ``.logits``):
        a transformers model, or any callable around another runtime.
    stride: tokens from one window to the next; ``window`` (no overlap) unless given.
    max_tokens: read only so many tokens of the text.
    progress: a bar on stderr; by default only on a terminal.

    Raises:
        ValueError: too few tokens, a wrong window, logits of a wrong shape, or logits that are NaN.
    """
    tokens = torch.as_tensor(tokens)
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise ValueError(f"tokens has shape {list(tokens.shape)} and dtype {tokens.dtype}; integers [T] are needed")
    stride = window if stride is None else stride
    truncated = max_tokens is not None and len(tokens) > max_tokens
    tokens = tokens[:max_tokens].long()
    parts = list(windows(len(tokens), window, stride))
    if not parts:
        raise ValueError(f"the text has {len(tokens)} token(s); at least 2 are needed for a perplexity")
    total = squares = 0.0
    count = 0
    for part in track(parts, "perplexity", show=progress):
        nll = token_nll(logits, tokens, part)
        total += float(nll.sum())
        squares += float(nll.square().sum())
        count += len(nll)
        if not math.isfinite(total):
            raise ValueError(f"the model's logits at tokens {part.start}..{part.end} hold NaN or rule out a real token")
    mean = total / count
    variance = max(squares / count - mean * mean, 0.0)
    return Perplexity(math.exp(mean), mean, math.sqrt(variance / count), count, window, stride, truncated)


def text_corpus(
    tokenizer: PreTrainedTokenizerBase,
    name: str = "speeches",
    part: str = "evaluation",
    *,
    max_tokens: int | None = None,
) -> Tensor:
    """Tokens int64 [T] of a corpus of :mod:`tilewright.data` (names and parts: its ``corpus`` function)."""
    from tilewright import data

    return tokenize(tokenizer, data.corpus(name, part), max_tokens=max_tokens)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, max_tokens: int | None = None) -> Tensor:
    """Tokens int64 [T] of a plain text, without special tokens or chat template."""
    if max_tokens is not None:
        # Eight characters a token is more than any natural text has; the rest need not be tokenized.
        text = text[: 8 * max_tokens]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def token_batches(tokens: Tensor, *, length: int = 512, count: int | None = None) -> list[Tensor]:
    """Calibration batches [1, length]: consecutive pieces of a token stream, the short rest dropped.

    Raises:
        ValueError: the stream is shorter than the ``count`` pieces asked for (or than one).
    """
    available = len(tokens) // length
    if available < (count or 1):
        raise ValueError(f"{len(tokens)} tokens give {available} batches of {length}; {count or 1} are needed")
    return [piece[None] for piece in tokens[: (count or available) * length].split(length)]
