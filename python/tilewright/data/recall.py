# SPDX-License-Identifier: Apache-2.0
"""Synthetic sequence tasks: what a token mixer can remember, track or fit, made from a seed.

Every task is a function ``task(batch, seed, *, ...)`` that returns ``(inputs, labels)`` and gives the same tensors for
the same arguments on every machine. Labels are aligned with the inputs: ``labels[b, t]`` is what the model's output at
position t must say (nothing is left to shift), and ``IGNORE`` where nothing is asked. :class:`Stream` turns a task
into the batches of a training run, numbered by step.

Token tasks use token 0 as the blank that fills unused positions.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not scored (the default ``ignore_index`` of torch's cross-entropy)."""
BLANK = 0
ANSWERS = 4
"""Different values of :func:`key_value_recall`."""

Batch = tuple[Tensor, Tensor]


def mix(*numbers: int) -> int:
    """One seed (63 bits) out of several integers; different tuples give unrelated seeds, unlike their sums."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Stream:
    """Batches of a task by step: ``stream(step)`` is ``task(batch, mix(seed, step), **settings)``.

    A run that resumes at a step asks for that step's batch; there is no position to save. Streams of different
    seeds share no batch, so an evaluation takes another seed than the training.
    """

    task: Callable[..., Batch]
    batch: int
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, step: int) -> Batch:
        """The batch of one step."""
        return self.task(self.batch, mix(self.seed, step), **self.settings)


def multi_query_recall(
    batch: int,
    seed: int,
    *,
    length: int = 128,
    pairs: int = 8,
    vocabulary: int = 64,
    queries: int | None = None,
    gap: int = 0,
    rewrites: int = 0,
) -> Batch:
    """Multi-query associative recall (MQAR, arXiv 2312.04927 section 3): tokens int64 [B, T] twice.

    First ``pairs`` distinct keys, each with its value, then queries: keys seen before, in random order at random
    positions; the label at a query is the value of its key. Keys are tokens 1 .. vocabulary/2 - 1 and values
    vocabulary/2 .. vocabulary - 1, so that no token is both.

    queries: keys asked (without repetition); all of them when None.
    gap: blanks between a key and its value. 0 puts them side by side, which a short convolution of width 2 already
        binds; ``gap >= conv_size - 1`` puts the value out of a convolution's reach.
    rewrites: of the keys, so many are written again with another value after all pairs; the last value counts.

    Raises `ValueError` when the keys do not fit the vocabulary or the tokens do not fit ``length``.
    """
    queries = pairs if queries is None else queries
    writes = (pairs + rewrites) * (2 + gap)
    _require_keys(pairs, vocabulary)
    if not 0 <= queries <= pairs or not 0 <= rewrites <= pairs or gap < 0:
        raise ValueError(f"queries={queries}, rewrites={rewrites}, gap={gap}: 0 to pairs={pairs}, and gap >= 0 needed")
    if writes + queries > length:
        raise ValueError(
            f"length={length} is too short: {pairs} pairs, {rewrites} rewrites and {queries} queries with gap={gap} "
            f"take {writes + queries} tokens; raise length or lower pairs"
        )
    random = _generator(seed)
    keys = 1 + _distinct(batch, vocabulary // 2 - 1, pairs, random)
    first = _values(batch, pairs, vocabulary, random)
    again = _other_values(first[:, :rewrites], vocabulary, random)
    written = torch.cat([keys, keys[:, :rewrites]], 1)
    inputs = torch.full((batch, length), BLANK)
    labels = torch.full((batch, length), IGNORE)
    inputs[:, 0 : writes : 2 + gap] = written
    inputs[:, 1 + gap : writes : 2 + gap] = torch.cat([first, again], 1)
    newest = torch.cat([again, first[:, rewrites:]], 1)
    asked = _distinct(batch, pairs, queries, random)
    places = writes + _distinct(batch, length - writes, queries, random)
    inputs.scatter_(1, places, keys.gather(1, asked))
    labels.scatter_(1, places, newest.gather(1, asked))
    return inputs, labels


def key_value_recall(
    batch: int, seed: int, *, length: int = 64, pairs: int = 24, vocabulary: int = 125, fewest: int | None = None
) -> Batch:
    """Recall without binding: one token holds a key and its value, so that no layer must join neighbours first.

    With n = (vocabulary - 5) / 5 keys and four values: token 0 is blank, 1 .. n ask for a key, the next 4 n are the
    pairs, the last four are the answers. First ``pairs`` pairs of distinct keys, then each key is asked once, at random
    positions; labels as everywhere here.

    fewest: each batch has so many pairs at least and ``pairs`` at most, drawn from its seed; None: always ``pairs``.
    Among many pairs the right one hardly shows in the first gradients, so that training starts on batches of few.

    Raises `ValueError` when the keys do not fit the vocabulary or the tokens do not fit ``length``.
    """
    keys = keys_of(vocabulary)
    if not 1 <= pairs <= keys or 2 * pairs > length:
        raise ValueError(
            f"pairs={pairs}: {max(keys, 0)} keys fit vocabulary={vocabulary}, and {length // 2} pairs with their "
            f"queries fit length={length}"
        )
    random = torch.Generator().manual_seed(seed)
    if fewest is not None:
        pairs = int(torch.randint(min(fewest, pairs), pairs + 1, (), generator=random))
    key = torch.rand(batch, keys, generator=random).argsort(1)[:, :pairs]
    value = torch.randint(ANSWERS, (batch, pairs), generator=random)
    inputs, labels = torch.full((batch, length), BLANK), torch.full((batch, length), IGNORE)
    inputs[:, :pairs] = 1 + keys + key * ANSWERS + value
    asked = torch.rand(batch, pairs, generator=random).argsort(1)
    places = pairs + torch.rand(batch, length - pairs, generator=random).argsort(1)[:, :pairs]
    inputs.scatter_(1, places, 1 + key.gather(1, asked))
    labels.scatter_(1, places, 1 + keys * (1 + ANSWERS) + value.gather(1, asked))
    return inputs, labels


def keys_of(vocabulary: int) -> int:
    """Keys of :func:`key_value_recall` that a vocabulary has room for."""
    return (vocabulary - 1 - ANSWERS) // (1 + ANSWERS)


@dataclass(frozen=True)
class Curriculum:
    """Batches of a recall task by step, with few pairs first: :class:`Stream` for runs of some hundred steps.

    Which of many pairs a query asks for hardly shows in the first gradients, so that a model sits at the share of
    guessing for most of such a run. The number of pairs grows from ``first`` to ``pairs`` by a constant factor a step
    over the first part ``growing`` of the steps, and stays there. Sequences hold nothing but pairs and queries
    (``length = tokens * pairs``); shorter ones come in batches of up to ``widest`` times as many, which hold no more
    tokens than those at the end.

    pairs, vocabulary: at the end, as in :func:`multi_query_recall`. batch: sequences of a step at the end. steps: of
    the run. task: takes (batch, seed, length, pairs, vocabulary). tokens: of a pair and its query.

    Raises `ValueError` when ``first`` is not in 1 .. pairs or ``growing`` not in 0 .. 1.
    """

    pairs: int
    steps: int
    batch: int = 32
    vocabulary: int = 64
    seed: int = 0
    first: int = 2
    growing: float = 0.5
    widest: int = 4
    task: Callable[..., Batch] = multi_query_recall
    tokens: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.pairs or not 0.0 <= self.growing <= 1.0:
            raise ValueError(
                f"first={self.first}, growing={self.growing}: 1 to pairs={self.pairs} and 0 to 1 are needed"
            )

    def pairs_at(self, step: int) -> int:
        """Of a sequence of this step's batch."""
        grown = min(1.0, step / (self.growing * self.steps)) if self.growing * self.steps > 0 else 1.0
        return round(self.first * (self.pairs / self.first) ** grown)

    def __call__(self, step: int) -> Batch:
        """The batch of one step."""
        pairs = self.pairs_at(step)
        return self.draw(self.batch * min(self.widest, self.pairs // pairs), mix(self.seed, step), pairs)

    def draw(self, batch: int, seed: int, pairs: int | None = None) -> Batch:
        """Sequences of so many pairs; of all of them when None."""
        pairs = self.pairs if pairs is None else pairs
        return self.task(batch, seed, length=self.tokens * pairs, pairs=pairs, vocabulary=self.vocabulary)


def recall_at_distance(
    batch: int,
    seed: int,
    *,
    length: int = 256,
    pairs: int = 8,
    vocabulary: int = 64,
    distance: int | tuple[int, int] = 128,
    gap: int = 0,
) -> Batch:
    """Key-value recall with the key exactly ``distance`` tokens before its query: tokens int64 [B, T] twice.

    Pairs are written one after another from position 0; the query of a pair stands ``distance`` tokens after the
    pair's key, so every query of a sequence has the same distance. Alphabet, labels and ``gap`` as in
    :func:`multi_query_recall`.

    distance: tokens from a key to its query, or the smallest and largest, drawn for each sequence.

    Raises `ValueError` when a query would fall among the pairs or beyond ``length``.
    """
    stride = 2 + gap
    low, high = (distance, distance) if isinstance(distance, int) else distance
    _require_keys(pairs, vocabulary)
    if gap < 0 or low < pairs * stride or high < low or (pairs - 1) * stride + high >= length:
        raise ValueError(
            f"distance={distance} does not fit: {pairs} pairs with gap={gap} need a distance of {pairs * stride} to "
            f"{length - 1 - (pairs - 1) * stride} tokens in length={length}"
        )
    random = _generator(seed)
    keys = 1 + _distinct(batch, vocabulary // 2 - 1, pairs, random)
    values = _values(batch, pairs, vocabulary, random)
    inputs = torch.full((batch, length), BLANK)
    labels = torch.full((batch, length), IGNORE)
    inputs[:, 0 : pairs * stride : stride] = keys
    inputs[:, 1 + gap : pairs * stride : stride] = values
    drawn = torch.randint(low, high + 1, (batch, 1), generator=random)
    places = drawn + stride * torch.arange(pairs)
    return inputs.scatter_(1, places, keys), labels.scatter_(1, places, values)


def parity(batch: int, seed: int, *, length: int = 32, every: bool = True) -> Batch:
    """Running parity of random bits: inputs int64 [B, T] of 0 and 1, ``labels[t] = sum(inputs[: t + 1]) mod 2``.

    every: label each position; otherwise only the last.
    """
    inputs = torch.randint(0, 2, (batch, length), generator=_generator(seed))
    return inputs, _last_only(inputs.cumsum(1) % 2, every)


def permutations(elements: int) -> Tensor:
    """All permutations of 0 .. n-1 in lexicographic order, int64 [n!, n]; row i is what token i stands for."""
    return torch.tensor(list(itertools.permutations(range(elements))))


def permutation_tracking(
    batch: int, seed: int, *, length: int = 32, elements: int = 5, moves: str = "all", every: bool = True
) -> Batch:
    """Word problem of the symmetric group S_n (state tracking, arXiv 2404.08819): tokens int64 [B, T] twice.

    Token i stands for ``permutations(n)[i]``. The label at t is the token of the product p_t o ... o p_1 o p_0 (the
    first token is applied first).

    moves: "all" draws from the whole group, "swaps" from the transpositions. every: as in :func:`parity`.
    """
    if moves not in ("all", "swaps") or not 2 <= elements <= 6:
        raise ValueError(f"moves={moves!r}, elements={elements}: moves 'all' or 'swaps' and 2 to 6 elements are needed")
    table = permutations(elements)
    moved = (table != torch.arange(elements)).sum(1)
    allowed = torch.arange(len(table)) if moves == "all" else torch.nonzero(moved == 2)[:, 0]
    draws = torch.randint(0, len(allowed), (batch, length), generator=_generator(seed))
    inputs = allowed[draws]
    state = torch.arange(elements).expand(batch, elements)
    labels = torch.empty_like(inputs)
    for t in range(length):
        state = table[inputs[:, t]].gather(1, state)  # (p o s)(x) = p(s(x))
        labels[:, t] = (state[:, None] == table).all(2).int().argmax(1)
    return inputs, _last_only(labels, every)


def piecewise_linear(
    batch: int,
    seed: int,
    *,
    length: int = 256,
    segment: int = 64,
    inputs: int = 8,
    outputs: int = 8,
    spread: float = 1.0,
    width: float = 1.0,
    noise: float = 0.0,
) -> Batch:
    """Regression whose law changes every ``segment`` samples: x float32 [B, T, d_x], y float32 [B, T, d_y].

    In segment s: c_s ~ N(0, spread^2 I), W_s with entries N(0, 1/d_x), x_t = c_s + width N(0, I) and
    y_t = W_s x_t + noise N(0, I) (the setting of test-time regression in arXiv 2510.01450: inputs are clustered
    around their segment's centre). ``segment >= length`` is in-context linear regression with one law.
    """
    if segment < 1 or length < 0 or min(inputs, outputs) < 1:
        raise ValueError(
            f"segment={segment}, length={length}, inputs={inputs}, outputs={outputs}: positive sizes needed"
        )
    random = _generator(seed)
    segments = -(-length // segment)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=random)

    law = torch.arange(length) // segment
    weight = normal(segments, outputs, inputs) / inputs**0.5
    x = spread * normal(segments, inputs)[:, law] + width * normal(length, inputs)
    y = torch.einsum("btoi,bti->bto", weight[:, law], x) + noise * normal(length, outputs)
    return x, y


def in_context_regression(batch: int, seed: int, **settings: Any) -> Batch:
    """:func:`piecewise_linear` as a sequence for a model with continuous inputs.

    Inputs float32 [B, 2T, d_x + d_y] alternate [x_t, 0] and [0, y_t]; labels float32 [B, 2T, d_y] hold y_t at the
    position of x_t and NaN at the position of y_t, where nothing is asked (see ``tilewright.train.regression_loss``).
    """
    x, y = piecewise_linear(batch, seed, **settings)
    questions = torch.cat([x, torch.zeros_like(y)], 2)
    answers = torch.cat([torch.zeros_like(x), y], 2)
    inputs = torch.stack([questions, answers], 2).flatten(1, 2)
    return inputs, torch.stack([y, torch.full_like(y, torch.nan)], 2).flatten(1, 2)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _distinct(batch: int, below: int, count: int, random: torch.Generator) -> Tensor:
    """Integers [batch, count] in 0 .. below-1, without repetition in a row."""
    return torch.rand(batch, below, generator=random).argsort(1)[:, :count]


def _values(batch: int, count: int, vocabulary: int, random: torch.Generator) -> Tensor:
    return torch.randint(vocabulary // 2, vocabulary, (batch, count), generator=random)


def _other_values(old: Tensor, vocabulary: int, random: torch.Generator) -> Tensor:
    """Values that differ from ``old`` entry by entry."""
    low, count = vocabulary // 2, vocabulary - vocabulary // 2
    return low + (old - low + torch.randint(1, count, old.shape, generator=random)) % count


def _require_keys(pairs: int, vocabulary: int) -> None:
    if not 1 <= pairs <= vocabulary // 2 - 1:
        raise ValueError(
            f"pairs={pairs}: vocabulary={vocabulary} has {max(vocabulary // 2 - 1, 0)} keys; 1 to that many are needed"
        )


def _last_only(labels: Tensor, every: bool) -> Tensor:
    if not every:
        labels[:, :-1] = IGNORE
    return labels
