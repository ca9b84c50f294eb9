# SPDX-License-Identifier: Apache-2.0
"""Records of the decode engine for a layer with linear attention (csrc/engine/records)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from tilewright.models.mixers import FUNCTIONS, HeadMap, LinearMixer

# csrc/engine/step.h
ROTATE, FEATURE_MAP, WINDOW_ATTENTION, LINEAR_ATTENTION = range(8, 12)
ABSENT = -1
# csrc/engine/records/linear_attention.cpp
_ADDITIVE = 0
_NO_DECAY, _CHANNEL_DECAY = 0, 3
_STORE, _AVERAGE, _SHARED = range(3)


def float_bits(value: float) -> int:
    """A float as a program holds it: the bits of a float64."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


@dataclass
class _Map:
    """A map with its parameters taken: the words that they give, and the sizes that they decide."""

    source: str
    target: str
    heads: int
    features: int
    words: list[int]


class MixerRecords:
    """What a :class:`LinearMixer` of a layer with these heads becomes.

    Args:
        heads, kv_heads, head_dim: of the layer's projections.
        take: a parameter by name.
        floats: places a tensor in the arena and gives its offset.

    Attributes:
        slots: slots that the records need beside q, k, v, attended and angles, with their widths.

    Raises:
        ValueError: a parameter does not have the shape that the heads need.
    """

    def __init__(
        self,
        mixer: LinearMixer,
        heads: int,
        kv_heads: int,
        head_dim: int,
        take: Callable[[str], Tensor],
        floats: Callable[[Tensor], int],
    ) -> None:
        self._mixer, self._heads, self._kv_heads, self._head_dim = mixer, heads, kv_heads, head_dim
        self._take, self._floats = take, floats
        self._placed: dict[str, tuple[list[int], int]] = {}
        self._query = self._map("q", "mapped q", mixer.query, heads)
        self._key = self._map("k", "mapped k", mixer.key, kv_heads)
        self._gate = None if mixer.gate is None else self._map("k", "gate", mixer.gate, kv_heads)
        for made in (self._query, self._key, self._gate):
            if made is not None and (made.features != self._query.features or heads % made.heads):
                raise ValueError(
                    f"LinearMixer: {made.target} has {made.heads} heads of {made.features} features; the mapped "
                    f"queries have {self._query.features}, and heads must divide the {heads} of the queries"
                )
        # Query heads that share keys and values share a state.
        self._states = max(kv_heads, self._key.heads)
        self.slots = {m.target: m.heads * m.features for m in (self._query, self._key, self._gate) if m is not None}
        if self._shares_denominator:
            self.slots["window"] = heads * (head_dim + 1)

    @property
    def _shares_denominator(self) -> bool:
        return self._mixer.window is not None and self._mixer.window.mix is not None

    def _map(self, source: str, target: str, spec: HeadMap, source_heads: int) -> _Map:
        heads = source_heads if spec.heads is None else spec.heads
        weight, weight_heads, inner = ABSENT, 0, self._head_dim
        if spec.weight is not None:
            shape, weight = self._place(spec.weight)
            if len(shape) != 3 or shape[0] not in (1, heads) or shape[1] != self._head_dim:
                raise ValueError(f"{spec.weight} has shape {shape}, needed [{heads} or 1, {self._head_dim}, n]")
            weight_heads, inner = shape[0], shape[2]
        bias, bias_heads = ABSENT, 0
        if spec.bias is not None:
            shape, bias = self._place(spec.bias)
            if len(shape) != 2 or shape[0] not in (1, heads) or shape[1] != inner:
                raise ValueError(f"{spec.bias} has shape {shape}, needed [{heads} or 1, {inner}]")
            bias_heads = shape[0]
        words = [FUNCTIONS.index(spec.function), heads, source_heads, inner, weight_heads]
        words += [weight] if weight_heads else []
        words += [bias_heads] + ([bias] if bias_heads else [])
        words += [float_bits(spec.factor), float_bits(spec.cap)]
        return _Map(source, target, heads, spec.features(inner), words)

    def records(self, slots: dict[str, int]) -> Iterator[tuple[int, list[int]]]:
        """Kind and arguments of each record, in the order that they run."""
        mixer = self._mixer
        maps = self._maps(slots)
        if not mixer.after_rotation:
            yield FEATURE_MAP, maps
        if mixer.after_rotation or mixer.window is not None:
            yield ROTATE, [slots["angles"], 2, slots["q"], slots["k"]]
        if mixer.window is not None:
            yield WINDOW_ATTENTION, self._window(slots, mixer.window.size)
        if mixer.after_rotation:
            yield FEATURE_MAP, maps
        yield LINEAR_ATTENTION, self._linear(slots)

    def _maps(self, slots: dict[str, int]) -> list[int]:
        maps = [m for m in (self._query, self._key, self._gate) if m is not None]
        return [len(maps), *(word for m in maps for word in (slots[m.source], slots[m.target], *m.words))]

    def _window(self, slots: dict[str, int], size: int) -> list[int]:
        shared = self._shares_denominator
        shape = [self._heads, self._kv_heads, self._head_dim, self._head_dim, size]
        target = slots["window" if shared else "attended"]
        # Linear attention over older tokens reads, in place of each token, the one that leaves the window for it.
        leaving = [slots["k"], slots["v"]] if shared else [ABSENT, ABSENT]
        sources = [slots["q"], slots["k"], slots["v"]]
        return [*shape, float_bits(self._head_dim**-0.5), int(not shared), *sources, target, *leaving]

    def _linear(self, slots: dict[str, int]) -> list[int]:
        mixer, window = self._mixer, self._mixer.window
        sizes = [self._heads, self._states, _ADDITIVE, self._query.features, self._head_dim]
        sources = [slots[self._query.target], slots[self._key.target], slots["v"]]
        decay = [_NO_DECAY] if self._gate is None else [_CHANNEL_DECAY, slots[self._gate.target]]
        record = [*sizes, *sources, slots["attended"], *decay, float_bits(mixer.scale)]
        record += [int(mixer.normalize), float_bits(mixer.eps)]
        if window is None:
            return [*record, 0, _STORE]
        if window.mix is None:
            factors = [float_bits(window.linear_factor), float_bits(window.window_factor)]
            return [*record, 0, _AVERAGE, slots["attended"], *factors]
        shape, mix = self._place(window.mix)
        if shape != [self._heads]:
            raise ValueError(f"{window.mix} has shape {shape}, needed [{self._heads}]")
        return [*record, window.size, _SHARED, slots["window"], mix]

    def _place(self, name: str) -> tuple[list[int], int]:
        """Shape and offset of a parameter; several maps may read one."""
        if name not in self._placed:
            values = self._take(name)
            self._placed[name] = list(values.shape), self._floats(values)
        return self._placed[name]
