# SPDX-License-Identifier: Apache-2.0
"""The model and text on which Liger's claim is checked: its last layers, fed with what the first ones gave once.

Layers that are not converted and lie before all converted ones never change, so their output on every window is
computed once; training and evaluation then run the rest.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tilewright import data, evaluate, models
from tilewright.data.bytes import ByteWindows
from tilewright.linearize import convert, method
from tilewright.linearize.liger.config import LigerConfig
from tilewright.linearize.liger.method import LigerAttention, liger_attention
from tilewright.linearize.text import text_tokens
from tilewright.linearize.tuning import tune_lora
from tilewright.train import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAPS = ("query_map", "key_map")
_TEXTS = ("speeches", "moby-dick")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything: the claim's two forms differ in this alone.

    first: first converted layer. window: tokens of an evaluation window, windows: how many. length: tokens of a
    training step. steps, short: of the main runs and of the ablation's. rates: learning rates to choose from. kept:
    layers of the model that the hybrid does not convert.
    """

    first: int
    window: int
    windows: int
    length: int
    steps: int
    short: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    kept: tuple[int, ...]


FULL = Scale(0, 512, 2, 128, 40, 8, (1e-3, 3e-3, 1e-2), (0, 1), (7, 14, 21, 28))
QUICK = Scale(26, 256, 2, 96, 24, 4, (1e-2,), (0,), (27,))


class Bench:
    """SmolLM2 in float32, the tail of its layers from ``scale.first`` on, training windows and held-out text."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.loaded = models.load(data.smollm2_gguf())
        self.base = models.to_transformers(self.loaded, dequantize=True)
        tokenizer = self.loaded.tokenizer
        self.text = evaluate.text_corpus(tokenizer, "speeches", "evaluation", max_tokens=scale.window * scale.windows)
        self.training = text_tokens(tokenizer, _TEXTS, "calibration")
        self.tail = self._tail()
        self.windows = [
            (part, self.enter(self.text[None, part.start : part.end]))
            for part in evaluate.windows(len(self.text), scale.window, scale.window)
        ]
        self._seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.start = self.perplexity(self.tail)

    def _tail(self) -> PreTrainedModel:
        """The base model's layers from ``first`` on, its norm and its head; its inputs are hidden states."""
        config = copy.deepcopy(self.base.config)
        config.num_hidden_layers -= self.scale.first
        with torch.device("meta"):
            tail: Any = type(self.base)(config)
        body: Any = self.base.model
        tail.model.layers = nn.ModuleList(copy.deepcopy(list(body.layers[self.scale.first :])))
        for index, layer in enumerate(tail.model.layers):
            layer.self_attn.layer_idx = index
        tail.model.norm, tail.model.rotary_emb, tail.lm_head = body.norm, body.rotary_emb, self.base.lm_head
        tail.model.embed_tokens = nn.Identity()
        return tail.eval().requires_grad_(False)

    def enter(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, T, width] that reach the tail."""
        body: Any = self.base.model
        with torch.no_grad():
            hidden: Tensor = body.embed_tokens(tokens)
            angles = body.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])
            for layer in body.layers[: self.scale.first]:
                hidden = layer(hidden, attention_mask=None, position_embeddings=angles)
        return hidden

    def batches(self, seed: int) -> Any:
        """Numbered training windows of one seed, their hidden states kept."""
        windows = ByteWindows(self.training, 1, self.scale.length, seed)

        def batch(number: int) -> tuple[Tensor, Tensor]:
            if (seed, number) not in self._seen:
                inputs, labels = windows(number)
                self._seen[seed, number] = (self.enter(inputs), labels)
            return self._seen[seed, number]

        return batch

    def perplexity(self, tail: nn.Module, windows: int | None = None) -> float:
        """Perplexity of a tail on the held-out text, or on its first windows."""
        total, count = 0.0, 0
        for part, hidden in self.windows[:windows]:
            run = functools.partial(tail, inputs_embeds=hidden, use_cache=False)
            nll = evaluate.token_nll(lambda _, run=run: run(), self.text, part)  # type: ignore[misc]
            total, count = total + float(nll.sum()), count + len(nll)
        return math.exp(total / count)

    def converted(self, config: LigerConfig, *, maps: bool = False, keep: tuple[int, ...] = ()) -> PreTrainedModel:
        """A converted copy of the tail; ``keep`` counts the whole model's layers."""
        how = method("liger")
        if maps:
            how = dataclasses.replace(how, attention=MappedLiger)
        kept = [index - self.scale.first for index in keep if index >= self.scale.first]
        return convert(self.tail, how, config, keep=kept)

    def tuned(self, tail: PreTrainedModel, seed: int, lr: float, steps: int, windows: int | None = None) -> float:
        """Tune a converted tail and measure it; a training that diverges counts as infinite perplexity."""
        how: dict[str, Any] = {"warmup": steps // 8, "also": MAPS, "seed": seed, "progress": False}
        try:
            tune_lora(tail, self.batches(seed), steps=steps, lr=lr, **how)
        except TrainingError:
            return math.inf
        return self.perplexity(tail, windows)

    def whole(self, tail: PreTrainedModel) -> PreTrainedModel:
        """The whole model with this tail; it shares everything that was not trained."""
        whole: Any = copy.copy(self.base)
        whole._modules = dict(self.base._modules)
        whole.model = copy.copy(self.base.model)
        body: Any = tail.model
        layers = [copy.copy(layer) for layer in body.layers]
        for index, layer in enumerate(layers):
            layer._modules = dict(layer._modules)
            layer.self_attn = copy.copy(layer.self_attn)
            layer.self_attn.layer_idx = index + self.scale.first
        whole.model._modules = dict(self.base.model._modules)
        before: Any = self.base.model
        whole.model.layers = nn.ModuleList([*before.layers[: self.scale.first], *layers])
        return whole


class MappedLiger(LigerAttention):
    """Liger with learned feature maps in the recurrent branch, the ablation that the paper reports as harmful.

    softmax(W q) and softmax(W k) per head, W from N(0, 1 / D), trained with everything else.
    """

    def __init__(self, base: nn.Module, config: LigerConfig) -> None:
        super().__init__(base, liger=config)
        generator = torch.Generator().manual_seed(self.layer_idx)
        for name, heads in zip(MAPS, (self.num_heads, self.num_key_value_heads), strict=True):
            shape = (heads, self.head_dim, self.head_dim)
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) * self.head_dim**-0.5))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, real: Any, state: Any) -> Tensor:
        """The recurrent branch on mapped queries and keys, the softmax branch and the gate on the plain ones."""
        q_mapped, k_mapped = (
            torch.einsum("bthd,hde->bthe", x, self.get_parameter(name)) for x, name in zip((q, k), MAPS, strict=True)
        )
        recurrent, local = dataclasses.replace(self.liger, beta=0.0), dataclasses.replace(self.liger, alpha=0.0)
        y = liger_attention(q_mapped, k_mapped, v, k, cos=cos, sin=sin, config=recurrent, real=real, state=state)
        return y + liger_attention(q, k, v, cos=cos, sin=sin, config=local, real=real, state=state)
