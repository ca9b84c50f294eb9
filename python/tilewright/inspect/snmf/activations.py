# SPDX-License-Identifier: Apache-2.0
"""What enters an MLP's down projection, one token a row, and which token each row is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewright.capture import stream

_DOWN = r"mlp\.down_proj|mlp\.c_proj|mlp\.fc_out|mlp\.dense_4h_to_h|mlp\.fc2|feed_forward\.w2|fc2"
_SITE = re.compile(rf"(?:.*\.)?(\d+)\.(?:{_DOWN})")


@dataclass(frozen=True)
class TokenIndex:
    """Where every row comes from.

    sentence, position, token: int64 [n], number of the text, place of the token in it, vocabulary entry.
    texts: the token ids of every text, dropped positions included.
    """

    sentence: Tensor
    position: Tensor
    token: Tensor
    texts: list[list[int]]

    def __len__(self) -> int:
        return len(self.token)

    def rows_of(self, sentences: Sequence[int]) -> Tensor:
        """bool [n]: rows that belong to these texts."""
        return torch.isin(self.sentence, torch.as_tensor(list(sentences), dtype=torch.int64))


def mlp_site(model: nn.Module, layer: int | str) -> str:
    """Name of the down projection of a layer by number, or the module that is named.

    Known are the names of Llama, Mistral, Qwen, Gemma, GPT-2, GPT-J, GPT-NeoX, OPT and Phi in transformers.

    Raises:
        ValueError: no such layer or module; what exists is listed.
    """
    names = [name for name, _ in model.named_modules()]
    if isinstance(layer, str):
        if layer not in names:
            raise ValueError(f"layer={layer!r} is no module of {type(model).__name__}; give a number, or the full name")
        return layer
    found = {int(match[1]): name for name in names if (match := _SITE.fullmatch(name))}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no down projection of a known name; give the module's full name as layer"
        )
    if layer not in found:
        raise ValueError(f"layer={layer}: {type(model).__name__} has layers {min(found)} to {max(found)}")
    return found[layer]


def tokenize_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text, with the special tokens that the tokenizer adds.

    Raises:
        ValueError: no texts, or one without a token.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError("texts: a list with at least one text is needed")
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    for number, (text, some) in enumerate(zip(texts, ids, strict=True)):
        if not some:
            raise ValueError(f"texts[{number}]={text!r} has no token; remove it")
    return ids


def batches_of(texts: list[list[int]], size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Texts in order, ``size`` a batch, padded on the right and masked."""
    batches = []
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        longest = max(map(len, some))
        ids = torch.zeros(len(some), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(some):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return batches


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def collect_mlp_activations(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    layer: int | str,
    *,
    batch_size: int = 16,
    drop_first: bool = True,
    progress: bool | None = None,
) -> tuple[Tensor, TokenIndex]:
    """Activations X float32 [n, d_a] of one MLP for every token of every text, and the table of their tokens.

    An activation is the input of the down projection: act(W x) of a plain MLP, act(gate) * up of a gated one.

    model: a transformers model. layer: number, or full name of the down projection.
    drop_first: leave out the first token of each text (a BOS token where there is one): it holds massive activations
        that would take features for themselves.

    Raises:
        ValueError: as :func:`mlp_site` and :func:`tokenize_texts`; or no token is left.
    """
    found, index = collect_layers(
        model, tokenizer, texts, [layer], batch_size=batch_size, drop_first=drop_first, progress=progress
    )
    return found[layer], index


def collect_layers(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int | str],
    *,
    batch_size: int = 16,
    drop_first: bool = True,
    progress: bool | None = None,
) -> tuple[dict[int | str, Tensor], TokenIndex]:
    """:func:`collect_mlp_activations` of several layers in one pass over the texts."""
    ids = tokenize_texts(tokenizer, texts)
    sites = {layer: f"{mlp_site(model, layer)}@input" for layer in layers}
    sentence = torch.cat([torch.full((len(some),), number) for number, some in enumerate(ids)])
    position = torch.cat([torch.arange(len(some)) for some in ids])
    token = torch.tensor([one for some in ids for one in some])
    kept = position > 0 if drop_first else torch.ones_like(position, dtype=torch.bool)
    if not bool(kept.any()):
        raise ValueError("every text is a single token, which drop_first leaves out; give longer texts")
    pieces: dict[int | str, list[Tensor]] = {layer: [] for layer in layers}
    batches = batches_of(ids, batch_size, device_of(model))
    for rows in stream(model, batches, list(sites.values()), progress=progress):
        for layer, site in sites.items():
            pieces[layer].append(rows[site].float().cpu())
    found = {layer: torch.cat(some)[kept] for layer, some in pieces.items()}
    return found, TokenIndex(sentence[kept], position[kept], token[kept], ids)
