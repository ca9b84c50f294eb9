# SPDX-License-Identifier: Apache-2.0
"""A passkey hidden in real text: does a model still know a number it read long ago?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilewright.data.bytes import to_bytes
from tilewright.data.recall import IGNORE, Batch, mix
from tilewright.data.text import corpus

NEEDLE = "The pass key is {key}. Remember it: {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """A prompt that ends in the question, the answer (a space and the digits), and where the needle stands.

    depth: share of the haystack before the needle, as it came out (0 at the beginning, 1 just before the question).
    """

    prompt: str
    answer: str
    depth: float


def passkey_prompt(
    seed: int,
    *,
    length: int,
    depth: float = 0.5,
    digits: int = 5,
    measure: Callable[[str], int] = len,
    haystack: str | None = None,
) -> Passkey:
    """Hide a random number in sentences of real text and ask for it.

    length: most that prompt and answer may measure; sentences are added while they fit.
    measure: size of a text: characters by default; ``lambda text: len(tokenizer(text)["input_ids"])`` for tokens.
    depth: 0 to 1, where the needle goes. haystack: text to hide it in; the held-out speeches when None. The sentences
        are consecutive from a random place of it, around its end if need be.

    Raises `ValueError` when needle and question alone exceed ``length``, or ``depth`` is no share.
    """
    if not 0.0 <= depth <= 1.0 or digits < 1:
        raise ValueError(f"depth={depth}, digits={digits}: a depth of 0 to 1 and at least one digit are needed")
    random = torch.Generator().manual_seed(mix(seed))
    key = "".join(str(int(d)) for d in torch.randint(0, 10, (digits,), generator=random))
    needle, answer = NEEDLE.format(key=key), f" {key}"
    sentences = _sentences(corpus("speeches", "evaluation") if haystack is None else haystack)
    start = int(torch.randint(0, len(sentences), (1,), generator=random))
    sentences = sentences[start:] + sentences[:start]

    def built(count: int) -> tuple[str, int]:
        before = round(depth * count)
        return " ".join([*sentences[:before], needle, *sentences[before:count], QUESTION]), before

    if measure(built(0)[0] + answer) > length:
        raise ValueError(f"length={length}: needle and question alone measure {measure(built(0)[0] + answer)}")
    low, high = 0, len(sentences)
    while low < high:
        middle = (low + high + 1) // 2
        fits = measure(built(middle)[0] + answer) <= length
        low, high = (middle, high) if fits else (low, middle - 1)
    prompt, before = built(low)
    return Passkey(prompt, answer, before / low if low else 0.0)


def passkey_bytes(batch: int, seed: int, *, length: int = 512, depth: float | None = None, digits: int = 5) -> Batch:
    """Passkeys for a byte-level model: inputs and labels int64 [B, T], the answer's bytes labelled, the rest `IGNORE`.

    Prompts are padded on the left with spaces to ``length`` tokens. depth: None draws one for each sequence. A task in
    the sense of ``tilewright.data.recall``; for training on other text than the evaluation's see ``passkey_prompt``.
    """
    random = torch.Generator().manual_seed(mix(seed))
    rows = []
    for _ in range(batch):
        where = float(torch.rand(1, generator=random)) if depth is None else depth
        one = int(torch.randint(0, 2**62, (1,), generator=random))
        made = passkey_prompt(one, length=length + 1, depth=where, digits=digits, measure=_byte_count)
        rows.append(to_bytes((made.prompt + made.answer).rjust(length + 1).encode()[-length - 1 :]).long())
    window = torch.stack(rows) if rows else torch.empty(0, length + 1, dtype=torch.int64)
    labels = window[:, 1:].clone()
    labels[:, : length - digits] = IGNORE
    return window[:, :-1], labels


def _byte_count(text: str) -> int:
    return len(text.encode())


def _sentences(text: str) -> list[str]:
    """Sentences of a text, by full stops; abbreviations may cut one short, which does no harm to a haystack."""
    words = " ".join(text.split())
    return [f"{one}." for one in words.removesuffix(".").split(". ") if one]
