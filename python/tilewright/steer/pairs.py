# SPDX-License-Identifier: Apache-2.0
"""Pairs of kinds of short text to steer between, written for this project: subject, tense, tone."""

from __future__ import annotations

import itertools
import random

TRAIN, HELD_OUT = 32, 64
"""Most texts of each side in the two parts."""

_WEATHER = (
    (
        "The rain", "A cold wind", "Morning fog", "The snow", "A warm breeze", "Thick cloud", "The storm", "Light hail",
        "The frost", "Bright sunshine", "A long drought", "Distant thunder", "The drizzle", "Sea mist", "The heat",
        "A sudden gale",
    ),
    (
        "came in from the coast.", "lasted until evening.", "covered the hills.", "cleared before noon.",
        "is forecast for Sunday.", "moved slowly north.", "hung over the valley.", "returned after a week.",
        "made the roads wet.", "arrived earlier than usual.", "will ease by tonight.", "cooled the whole city.",
        "kept everyone indoors.", "spread across the plain.", "was heavier in the west.", "faded at dawn.",
    ),
)  # fmt: skip
_ANIMALS = (
    (
        "The old dog", "A grey cat", "The young horse", "A red fox", "The white rabbit", "A brown bear", "The owl",
        "A small frog", "The tame parrot", "A wild goat", "The otter", "A black sheep", "The squirrel", "A tortoise",
        "The sparrow", "A baby elephant",
    ),
    (
        "slept beside the fire.", "chased a yellow leaf.", "drank from the stream.", "hid under the table.",
        "ate the last apple.", "watched its two cubs.", "licked a sore paw.", "ran along the fence.",
        "built a nest of twigs.", "scratched its left ear.", "followed the farmer home.", "sniffed the wet grass.",
        "climbed onto the wall.", "fed its hungry young.", "shook its thick fur.", "waited near the gate.",
    ),
)  # fmt: skip
_PEOPLE = (
    "Maria", "The teacher", "Our neighbour", "My brother", "The baker", "A tall man", "The pilot", "Anna", "The clerk",
    "His aunt", "The gardener", "Peter", "The nurse", "Her cousin", "The sailor", "A student",
)  # fmt: skip
_PRESENT = (
    "walks to the shop.", "reads the letter.", "opens the window.", "writes a short note.", "buys fresh bread.",
    "sings in the kitchen.", "paints the old door.", "drives to the lake.", "makes some tea.", "calls a friend.",
    "waits for the bus.", "takes the stairs.", "counts the boxes.", "finds a silver coin.", "leaves before lunch.",
    "keeps the receipt.",
)  # fmt: skip
_PAST = (
    "walked to the shop.", "read the letter.", "opened the window.", "wrote a short note.", "bought fresh bread.",
    "sang in the kitchen.", "painted the old door.", "drove to the lake.", "made some tea.", "called a friend.",
    "waited for the bus.", "took the stairs.", "counted the boxes.", "found a silver coin.", "left before lunch.",
    "kept the receipt.",
)  # fmt: skip
_THINGS = (
    "soup", "garden", "house", "road", "song", "bridge", "chair", "story", "river", "cake", "lamp", "market", "coat",
    "window", "picture", "train",
)  # fmt: skip
_QUALITIES = (
    "warm", "small", "quiet", "bright", "heavy", "simple", "lovely", "narrow", "clean", "strange", "cheap", "famous",
    "modern", "pretty", "long", "fine",
)  # fmt: skip

PAIRS = ("weather-animals", "present-past", "plain-exclamatory")


def _texts(name: str) -> tuple[list[str], list[str]]:
    """All 256 texts of each side; where the two sides share their words, number i is the same in both."""
    if name == "weather-animals":
        weather, animals = ([f"{a} {b}" for a, b in itertools.product(*side)] for side in (_WEATHER, _ANIMALS))
        return weather, animals
    if name == "present-past":
        present, past = ([f"{a} {b}" for a, b in itertools.product(_PEOPLE, side)] for side in (_PRESENT, _PAST))
        return present, past
    if name == "plain-exclamatory":
        both = list(itertools.product(_QUALITIES, _THINGS))
        return [f"The {thing} is {q}." for q, thing in both], [f"What a {q} {thing} this is!" for q, thing in both]
    raise ValueError(f"pair {name!r} is not known; known are {', '.join(PAIRS)}")


def pair(name: str, part: str = "train", count: int | None = None, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Source and target texts of a pair, unpaired: no text of one side has its counterpart on the other.

    Args:
        name: one of ``PAIRS``, "source-target".
        part: "train" or "held-out"; of one seed they share no text.
        count: texts of each side; None: all of the part, 32 or 64.
        seed: which texts fall in which part.

    Raises:
        ValueError: name or part is unknown, or count exceeds the part.
    """
    sides = _texts(name)
    if part not in ("train", "held-out"):
        raise ValueError(f"part {part!r}, needed 'train' or 'held-out'")
    most = TRAIN if part == "train" else HELD_OUT
    count = most if count is None else count
    if not 1 <= count <= most:
        raise ValueError(f"count = {count}, needed 1 .. {most} texts of part {part!r}")
    order = list(range(len(sides[0])))
    random.Random(seed).shuffle(order)
    half = len(order) // 2
    first = 0 if part == "train" else TRAIN
    chosen = (order[:half][first : first + count], order[half:][first : first + count])
    return [sides[0][i] for i in chosen[0]], [sides[1][i] for i in chosen[1]]
