# SPDX-License-Identifier: Apache-2.0
"""Teaching the feature maps of a converted model to imitate its softmax attention (arXiv 2402.04347, section 4.2)."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tilewright._progress import track
from tilewright.linearize.hedgehog.losses import Kind, attention_distill_loss
from tilewright.linearize.hedgehog.module import FeatureAttention, feature_attentions, softmax_teacher

Batch = Tensor | Mapping[str, Any]
Batches = Iterable[Batch] | Callable[[int], tuple[Tensor, Tensor]]
"""Inputs of the model, gone through again when they end; or a function from a step's number to (inputs, labels)."""


def distill(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float = 1e-2,
    kind: Kind = "xent",
    weight_decay: float = 0.0,
    final_lr: float = 0.1,
    block_size: int = 256,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train the feature maps of all layers at once, and nothing else, in place.

    Each layer's queries and keys come from the hidden states that softmax attention produces: during distillation every
    converted layer answers as its teacher, so no layer sees another's error. One forward pass serves all layers, and
    each layer's graph is gone before the next begins.

    Args:
        model: holds :class:`tilewright.linearize.hedgehog.FeatureAttention` modules, as a converted model does. The
            head of a transformers language model is not run.
        batches: token ids [B, T] or keyword arguments of the model (``attention_mask`` removes padding).
        steps: optimizer steps of AdamW. lr: at first; it falls to ``final_lr`` times that along half a cosine.
        kind: as in :func:`tilewright.linearize.hedgehog.attention_distill_loss`.
        block_size: tile of the loss.

    Returns:
        steps, losses (mean over layers and heads, one a step), and layers: each module's last loss.

    Raises:
        ValueError: nothing to distil, no batch, or steps < 1.
        FloatingPointError: a loss is not finite; layer and head are named.
    """
    found = feature_attentions(model)
    parameters = [p for attention in found.values() for p in attention.parameters()]
    if not parameters or steps < 1:
        raise ValueError(
            f"steps={steps}, {len(parameters)} parameters: both must be at least 1 (fixed maps learn nothing)"
        )
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    names = {id(attention): name for name, attention in found.items()}
    losses: list[float] = []
    now: dict[str, float] = {}

    def teach(attention: FeatureAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        with torch.enable_grad():
            heads = _head_losses(attention, q, k, v, mask, kind, block_size)
            _require_finite(names[id(attention)], heads)
            loss = heads.mean()
            loss.backward()
        now[names[id(attention)]] = float(loss.detach())

    with _only(model, parameters), softmax_teacher(model, teach):
        for step, batch in enumerate(track(_batches(batches, steps), "distilling", total=steps, show=progress)):
            for group in optimizer.param_groups:
                group["lr"] = lr * (final_lr + (1 - final_lr) * (1 + math.cos(math.pi * step / steps)) / 2)
            optimizer.zero_grad(set_to_none=True)
            _run(model, batch)
            optimizer.step()
            losses.append(sum(now.values()) / len(now))
    optimizer.zero_grad(set_to_none=True)
    return {"steps": steps, "losses": losses, "layers": dict(now)}


def distillation_losses(
    model: nn.Module, batches: Iterable[Batch], *, kind: Kind = "kl", block_size: int = 256
) -> dict[str, Tensor]:
    """How far each converted layer is from its teacher, on the teacher's hidden states: the mean of each head, [H].

    Args:
        batches: held-out batches of one size, as for :func:`distill`.
        kind: "kl" is 0 for perfect imitation.

    Returns:
        By module name.
    """
    found = feature_attentions(model)
    sums: dict[str, Tensor] = {}
    count = 0

    def look(attention: FeatureAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        name = names[id(attention)]
        sums[name] = sums.get(name, 0) + _head_losses(attention, q, k, v, mask, kind, block_size)

    names = {id(attention): name for name, attention in found.items()}
    with softmax_teacher(model, look):
        for batch in batches:
            _run(model, batch)
            count += 1
    if not count:
        raise ValueError("batches is empty; at least one batch is needed")
    return {name: total / count for name, total in sums.items()}


def _head_losses(
    attention: FeatureAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: Kind, block_size: int
) -> Tensor:
    return attention_distill_loss(
        q,
        k,
        attention.phi_q,
        attention.phi_k,
        causal=attention.causal,
        scale=attention.scale,
        kind=kind,
        v=v if kind == "mse" else None,
        block_size=block_size,
        attention_mask=mask,
        window=attention.config.window_size,
        mix=attention.mix,
        reduction="heads",
    )


def _require_finite(layer: str, heads: Tensor) -> None:
    bad = (~heads.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"distillation: the loss of {layer}, head {bad[0]}, is {float(heads[bad[0]].detach())}; lower lr, or take "
            "activation 'softmax_dim' or 'exp_dim'"
        )


@torch.no_grad()
def _run(model: nn.Module, batch: Batch) -> None:
    """A forward pass for its inner activations; of a transformers model without the head."""
    body = cast(nn.Module, getattr(model, "base_model", model))
    options = {"use_cache": False} if hasattr(model, "base_model") else {}
    if isinstance(batch, Mapping):
        body(**{name: x for name, x in batch.items() if name != "labels"}, **options)
    else:
        body(batch, **options)


def _batches(batches: Batches, steps: int) -> Iterator[Batch]:
    if callable(batches):
        for step in range(steps):
            yield batches(step)[0]
        return
    count = 0
    for batch in itertools.islice(itertools.cycle(batches), steps):
        count += 1
        yield batch
    if count < steps:
        raise ValueError("batches is empty; at least one batch is needed")


@contextlib.contextmanager
def _only(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, and gradients for these parameters alone; both as before afterwards."""
    training = [m for m in model.modules() if m.training]
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
