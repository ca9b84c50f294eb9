# SPDX-License-Identifier: Apache-2.0
"""What a feature is about: its neurons, the tokens that use it most, the words its direction writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.inspect.snmf.activations import TokenIndex, mlp_site
from tilewright.inspect.snmf.steering import down_weight

_FINAL_NORMS = ("model.norm", "transformer.ln_f", "model.decoder.final_layer_norm", "gpt_neox.final_layer_norm")


@dataclass(frozen=True)
class TokenInContext:
    """One token that uses a feature: its row, coefficient, text number, and up to 15 tokens on either side (ids)."""

    row: int
    coefficient: float
    sentence: int
    before: list[int]
    token: int
    after: list[int]

    def text(self, tokenizer: Any) -> str:
        """The context with the token in double angle brackets."""
        left, middle, right = (tokenizer.decode(ids) for ids in (self.before, [self.token], self.after))
        return f"{left}«{middle}»{right}"


def top_tokens(
    coefficients: Any, index: TokenIndex, feature: int, *, count: int = 25, context: int = 15
) -> list[TokenInContext]:
    """The tokens of largest coefficient of one feature (coefficients [n, k]), largest first; zeros are left out."""
    column = torch.as_tensor(coefficients)[:, feature]
    found = []
    for row in column.argsort(descending=True, stable=True)[:count].tolist():
        value = float(column[row])
        if value <= 0:
            break
        sentence, place = int(index.sentence[row]), int(index.position[row])
        ids = index.texts[sentence]
        found.append(
            TokenInContext(
                row,
                value,
                sentence,
                ids[max(0, place - context) : place],
                ids[place],
                ids[place + 1 : place + 1 + context],
            )
        )
    return found


def feature_neurons(vector: Any) -> list[tuple[int, float]]:
    """(neuron, weight) of the entries of a feature [d] that are not zero, the heaviest first."""
    v = torch.as_tensor(vector)
    kept = v.nonzero()[:, 0]
    order = kept[v[kept].abs().argsort(descending=True, stable=True)]
    return [(int(i), float(v[i])) for i in order]


@dataclass(frozen=True)
class Projection:
    """(token id, logit) pairs of the words that a direction raises most, and of those it lowers most."""

    raised: list[tuple[int, float]]
    lowered: list[tuple[int, float]]


def vocab_projection(
    model: nn.Module, layer: int | str, vector: Any, *, top: int = 75, final_norm: bool = False
) -> Projection:
    """The words that a feature [d_a] writes: W_down z times the output embedding (the logit lens).

    final_norm: scale W_down z by the weights of the model's last norm first.

    Raises:
        ValueError: the model has no output embedding, or no last norm of a known name.
    """
    name = mlp_site(model, layer)
    weight = down_weight(model.get_submodule(name)).detach().float()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding to project on")
    written = weight @ torch.as_tensor(vector).to(weight)
    if final_norm:
        written = written * _final_norm(model).to(written)
    with torch.no_grad():
        logits = head.weight.detach().float() @ written
    top = min(top, len(logits))
    up, down = logits.topk(top), (-logits).topk(top)
    return Projection(
        list(zip(up.indices.tolist(), up.values.tolist(), strict=True)),
        list(zip(down.indices.tolist(), (-down.values).tolist(), strict=True)),
    )


def _final_norm(model: nn.Module) -> Tensor:
    modules = dict(model.named_modules())
    for name in _FINAL_NORMS:
        if name in modules:
            weight: Any = modules[name].weight
            # Gemma's norms multiply by 1 + weight.
            return weight + 1 if type(modules[name]).__name__.startswith("Gemma") else weight
    raise ValueError(f"{type(model).__name__}: no last norm among {', '.join(_FINAL_NORMS)}; use final_norm=False")
