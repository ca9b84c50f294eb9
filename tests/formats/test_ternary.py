# SPDX-License-Identifier: Apache-2.0
"""Ternary packings: every combination of values survives, and what is not ternary is refused."""

from __future__ import annotations

import itertools

import pytest

from tilewright import _host

PACKINGS = {
    "two bits": (4, _host.ternary2_pack, _host.ternary2_unpack),
    "base 3": (5, _host.ternary5_pack, _host.ternary5_unpack),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_every_combination_survives_and_has_its_own_byte(name: str) -> None:
    width, pack, unpack = PACKINGS[name]
    combinations = list(itertools.product((-1, 0, 1), repeat=width))
    packed = [pack(list(trits)) for trits in combinations]
    assert [tuple(unpack(byte)) for byte in packed] == combinations
    assert len(set(packed)) == 3**width


def test_bytes_are_those_of_the_definition() -> None:
    assert _host.ternary2_pack([-1, 0, 1, 0]) == 0 | 1 << 2 | 2 << 4 | 1 << 6
    assert _host.ternary5_pack([1, -1, 0, -1, 1]) == 2 + 0 * 3 + 1 * 9 + 0 * 27 + 2 * 81


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("trits", [[0, 0, 0], [2, 0, 0, 0, 0], [0, -2, 0, 0]])
def test_what_is_not_ternary_is_refused(name: str, trits: list[int]) -> None:
    with pytest.raises(RuntimeError, match="ternary pack"):
        PACKINGS[name][1](trits)
