# SPDX-License-Identifier: Apache-2.0
"""Ten concepts in plain English (one in French, one in code), twenty short sentences each, written for this project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).resolve().parent / "concepts.txt"
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_WEEKDAY_FRAMES = (
    "The meeting is on {}.",
    "We will see each other on {} afternoon.",
    "Last {} was a quiet day.",
    "Every {} he cleans the kitchen.",
    "The parcel should arrive by {}.",
    "On {} the museum is free.",
)
NEUTRAL_PROMPTS = (
    "I think that",
    "The other day",
    "She told me",
    "We talked about",
    "This is a",
    "There was a",
    "He likes the",
    "It is about",
    "They wanted the",
    "You should see",
    "What I need is",
    "It all began with",
)
"""Beginnings that say nothing about any of the concepts, for the next word to be steered."""


@dataclass(frozen=True)
class Concept:
    """A name, ten words of the concept, twenty sentences about it."""

    name: str
    words: tuple[str, ...]
    sentences: tuple[str, ...]


def concepts() -> list[Concept]:
    """All ten, in the order of the file."""
    found: list[tuple[str, tuple[str, ...], list[str]]] = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name, _, words = line[1:].partition("]")
            found.append((name, tuple(words.split()), []))
        elif line:
            found[-1][2].append(line)
    return [Concept(name, words, tuple(sentences)) for name, words, sentences in found]


def weekday_sentences() -> list[str]:
    """Each weekday in each of six frames: 42 sentences, the frames together."""
    return [frame.format(day) for frame in _WEEKDAY_FRAMES for day in WEEKDAYS]
