# SPDX-License-Identifier: Apache-2.0
"""The record linear_attention with every rule and decay, in a program of one layer, against the float64 recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import VOCABULARY, engine_config, token_ids
from engine_oracle import distance
from torch import Tensor

from tilewright.models import image
from tilewright.models.engine import Engine
from tilewright.models.image import ModelImage
from tilewright.models.mixer_records import FEATURE_MAP, LINEAR_ATTENTION, float_bits
from tilewright.models.mixers import FUNCTIONS
from tilewright.reference.linear_attention import recurrence

HIDDEN, HEADS, KEY_HEADS, KEY, VALUE = 32, 4, 2, 12, 10
ADDITIVE, DELTA = 0, 1
NONE, CONSTANT, HEAD, CHANNEL = range(4)
WIDTHS = {"q": KEY_HEADS * KEY, "k": KEY_HEADS * KEY, "v": HEADS * VALUE, "beta": HEADS, "head": HEADS}
WIDTHS["channel"] = KEY_HEADS * KEY


class Layer(image._Compiler):
    """embed -> q, k, v, beta, gates -> linear_attention -> logits."""

    def __init__(self, rule: int, decay: int, normalize: bool, **changes: int) -> None:
        generator = torch.Generator().manual_seed(3)
        weights: dict[str, Any] = {
            name + ".weight": torch.randn(width, HIDDEN, generator=generator).to(torch.bfloat16) * 0.3
            for name, width in WIDTHS.items()
        }
        weights["table"] = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(torch.bfloat16)
        weights["logits"] = torch.randn(VOCABULARY, HEADS * VALUE, generator=generator).to(torch.bfloat16)
        self.constant = -torch.rand(HEADS, generator=generator)
        self.exact = {name: weight.double() for name, weight in weights.items()}
        super().__init__(engine_config(num_hidden_layers=1), weights, 0, 0, 0, 0)
        self.rule, self.decay, self.normalize, self.changes = rule, decay, normalize, changes

    def image(self) -> ModelImage:
        hidden, after = self._slot(0, HIDDEN)
        slots = {}
        for name, width in [*WIDTHS.items(), ("out", HEADS * VALUE)]:
            slots[name], after = self._slot(after, width)
        self._record(image._EMBED, [hidden, *self._matrix("table")])
        names = list(WIDTHS)
        for part in (names[:4], names[4:]):
            self._linear(hidden, image._NO_NORM, [(name, slots[name]) for name in part])
        # Positive queries and keys: a sum of weights far from zero, whose quotient rounding does not blow up.
        maps = {"q": ("softmax", KEY_HEADS), "k": ("softmax", KEY_HEADS), "beta": ("sigmoid", HEADS)}
        gates = {"head": ("log_sigmoid", HEADS), "channel": ("log_sigmoid", KEY_HEADS)}
        for some in (maps, gates):
            words = [len(some)]
            for name, (function, heads) in some.items():
                words += [slots[name], slots[name], FUNCTIONS.index(function), heads, heads, WIDTHS[name] // heads]
                words += [0, 0, float_bits(1.0), float_bits(0.0)]
            self._record(FEATURE_MAP, words)
        self._record(LINEAR_ATTENTION, self._words(slots))
        head = self._matrix("logits")
        self._record(image._LOGITS, [slots["out"], *image._NO_NORM, *self._activation(), *head])
        return ModelImage(self._program(), self._arena(), self.config, "int8", "bf16", "float32", 0, (), 1)

    def _words(self, slots: dict[str, int]) -> list[int]:
        change = lambda name, value: self.changes.get(name, value)  # noqa: E731
        words = [
            change("heads", HEADS),
            change("states", HEADS),
            self.rule,
            change("key", KEY),
            VALUE,
            slots["q"],
            slots["k"],
            slots["v"],
        ]
        words += [slots["out"], self.decay]
        words += {
            NONE: [],
            CONSTANT: [self._floats(self.constant)],
            HEAD: [slots["head"]],
            CHANNEL: [slots[change("gate", "channel")]],
        }[self.decay]
        words += [slots["beta"]] if self.rule == DELTA else []
        words += [float_bits(0.7), int(self.normalize), float_bits(0.25), 0, change("combine", 0)]
        return words + ([slots["out"], self._floats(self.constant)] if "combine" in self.changes else [])

    def logits(self, ids: list[int], dtype: torch.dtype) -> Tensor:
        weights = {name: weight.to(dtype) for name, weight in self.exact.items()}
        x = weights["table"][torch.tensor(ids)]
        made = {name: x @ weights[name + ".weight"].T for name in WIDTHS}
        q, k = (made[name].view(1, -1, KEY_HEADS, KEY).softmax(-1) for name in ("q", "k"))
        v = made["v"].view(1, -1, HEADS, VALUE)
        gate = {
            NONE: None,
            CONSTANT: self.constant.to(dtype),
            HEAD: torch.nn.functional.logsigmoid(made["head"])[None],
            CHANNEL: torch.nn.functional.logsigmoid(made["channel"])
            .view(1, -1, KEY_HEADS, KEY)
            .repeat_interleave(2, 2),
        }[self.decay]
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        rule = "delta" if self.rule == DELTA else "additive"
        beta = torch.sigmoid(made["beta"])[None]
        out, _ = recurrence(q, k, v, beta=beta if rule == "delta" else None, g=gate, rule=rule, scale=0.7)
        out = out[..., :-1] / (out[..., -1:] + 0.25) if self.normalize else out[..., :-1]
        return out.flatten(2)[0].to(dtype) @ weights["logits"].T


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [NONE, CONSTANT, HEAD, CHANNEL])
@pytest.mark.parametrize("rule", [ADDITIVE, DELTA])
def test_every_rule_and_decay_is_as_exact_as_float32_torch(rule: int, decay: int, normalize: bool, level: str) -> None:
    del level
    layer, ids = Layer(rule, decay, normalize), token_ids(50)
    exact = layer.logits(ids, torch.float64)
    near = layer.logits(ids, torch.float32)
    engine = Engine(layer.image(), 64, batch=2)
    block = engine.forward([ids[:35], ids[:1]], all_logits=True)[:35]
    ours = torch.cat([block, *(engine.step([i, None])[:1] for i in ids[35:])])
    assert 0 < distance(ours, exact) <= 2 * distance(near, exact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 6}, r"6 heads are not a multiple of 4 state heads"),
        ({"states": 2}, r"slot 'v' holds 4 heads, needed a divisor of 2"),
        ({"key": 7}, r"slot 'q' of width 24 does not hold heads of size 7"),
        ({"gate": "beta"}, r"slot 'gate' of width 4 does not hold heads of size 12"),
        ({"combine": 2}, r"a shared denominator needs argument 'normalize' = 1"),
    ],
)
def test_records_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        Engine(Layer(ADDITIVE, CHANNEL, False, **changes).image(), 16)
