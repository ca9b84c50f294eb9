# SPDX-License-Identifier: Apache-2.0
"""Where the full-attention layers of a hybrid stack lie (arXiv 2507.06457, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Placement = Literal["last", "middle", "first"]


def attention_layers(ratio: str | Sequence[int], num_layers: int, placement: Placement = "last") -> list[int]:
    """Indices of the full-attention layers, counted from 0.

    A ratio "r:1" makes groups of r linear layers and a full one. There are ``max(1, L // (r + 1))`` groups; what is
    left over stays linear. The full layer is the last of its group (index i with (i + 1) mod (r + 1) = 0; the last
    of the stack where none would fall inside), its middle or its first.

    Args:
        ratio: "r:1" with r > 0, "pure" (none), "full" (all), or the indices themselves.
        num_layers: L.
        placement: place in the group.

    Raises:
        ValueError: the ratio is none of these, an index is outside the stack or twice there, or L < 1.
    """
    if num_layers < 1:
        raise ValueError(f"attention_layers: num_layers = {num_layers}, needed at least 1")
    if placement not in ("last", "middle", "first"):
        raise ValueError(f"attention_layers: placement = {placement!r}, needed 'last', 'middle' or 'first'")
    if not isinstance(ratio, str):
        return _explicit([int(i) for i in ratio], num_layers)
    if ratio in ("pure", "full"):
        return list(range(num_layers)) if ratio == "full" else []
    linear, colon, one = ratio.partition(":")
    if not colon or one.strip() != "1" or not linear.strip().isdigit() or int(linear) < 1:
        raise ValueError(f"attention_layers: ratio = {ratio!r}, needed 'r:1' with r >= 1, 'pure', 'full' or a list")
    group = min(int(linear) + 1, num_layers)
    place = {"last": group - 1, "middle": group // 2, "first": 0}[placement]
    return [start * group + place for start in range(num_layers // group)]


def _explicit(indices: list[int], num_layers: int) -> list[int]:
    if outside := [i for i in indices if not 0 <= i < num_layers]:
        raise ValueError(
            f"attention_layers: index {outside[0]} is outside the {num_layers} layers 0 to {num_layers - 1}"
        )
    if len(set(indices)) != len(indices):
        raise ValueError(f"attention_layers: an index is repeated in {indices}")
    return sorted(indices)
