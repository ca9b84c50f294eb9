# SPDX-License-Identifier: Apache-2.0
"""Which memories a token goes to, and the loss that keeps them all in use (MoM, arXiv 2502.13685, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

NOWHERE = -1
"""The index of a slot that writes nothing and reads zero: what padding tokens get."""


def mom_route(
    x_or_logits: Tensor,
    topk: int,
    *,
    weight: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `topk` most probable memories of every token, and their shares.

    `p = softmax(x W_g)`, `idx = topk(p)`, `w_j = p_{idx_j} / sum_i p_{idx_i}` (MoM, eqs. 4 and 5). The gradient flows
    through w, not through idx; with `topk = 1` w is the constant 1. Equal probabilities go to the lower index first.

    Args:
        x_or_logits: router logits `[..., M]`; with `weight`, hidden states `[..., D]`.
        topk: slots of a token, k.
        weight: W_g as a linear layer holds it, `[M, D]`.
        attention_mask: `[...]`, 0 for padding, whose indices become -1 and whose weights 0.

    Returns:
        Weights `[..., k]` in float32 (float64 for float64 logits), int64 indices `[..., k]` by falling weight, and the
        logits `[..., M]`.

    Raises:
        ValueError: topk is not in 1..M, a shape does not fit, or a logit of a CPU tensor is NaN (on other devices a
            NaN raises `RuntimeError`, reported when the device is next waited for).
    """
    logits = x_or_logits if weight is None else F.linear(x_or_logits, weight)
    memories = logits.shape[-1]
    if not 1 <= topk <= memories:
        raise ValueError(f"mom_route: topk = {topk}, needed 1 to the number of memories, {memories}")
    if attention_mask is not None and attention_mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"mom_route: attention_mask has shape {list(attention_mask.shape)}, needed {list(logits.shape[:-1])}"
        )
    _refuse_nan(logits)
    scores = probabilities(logits)
    # A stable sort, because torch.topk leaves the order of equal values open.
    ranked, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    chosen, indices = ranked[..., :topk], indices[..., :topk]
    weights = torch.ones_like(chosen).detach() if topk == 1 else chosen / chosen.sum(-1, keepdim=True)
    if attention_mask is not None:
        padding = (attention_mask == 0)[..., None]
        indices, weights = indices.masked_fill(padding, NOWHERE), weights.masked_fill(padding, 0.0)
    return weights, indices, logits


def probabilities(logits: Tensor) -> Tensor:
    """The softmax over the last dimension, in float32 at least."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _refuse_nan(logits: Tensor) -> None:
    """Elsewhere than on the CPU the test must not wait for the device."""
    finite = ~logits.detach().isnan().any()
    message = "mom_route: a router logit is NaN; the hidden states or the router's weight are not finite"
    if logits.device.type != "cpu":
        torch._assert_async(finite, message)
    elif not torch.compiler.is_compiling() and not finite:
        raise ValueError(message)


def load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor],
    num_memories: int,
    topk: int,
    attention_mask: Tensor | None = None,
    *,
    layer_wise: bool = False,
) -> Tensor:
    """How unevenly tokens spread: `M sum_slots sum_m f_m P_m` (as Switch Transformers, arXiv 2101.03961, eq. 4).

    `f_m` is the share of tokens whose slot goes to memory m, `P_m` the mean router probability of m. It is k when both
    are uniform. The gradient flows through P only.

    Args:
        router_logits: `[B, T, M]` (or any `[..., M]`), or one such tensor a layer.
        num_memories: M, the routed memories (a shared memory is not routed to).
        topk: k.
        attention_mask: `[B, T]` (the logits' leading shape), 0 for tokens that do not count.
        layer_wise: the mean of the layers' losses, instead of the loss of all layers' tokens together.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 when no token counts.

    Raises:
        ValueError: there are no logits, a last dimension is not M, or the mask's shape does not fit.
    """
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    if not layers:
        raise ValueError("load_balancing_loss: router_logits is empty; needed the logits of at least one layer")
    for logits in layers:
        if logits.shape[-1] != num_memories:
            raise ValueError(
                f"load_balancing_loss: router_logits has shape {list(logits.shape)}, needed {num_memories} in the last "
                "dimension"
            )
        if attention_mask is not None and attention_mask.shape != logits.shape[:-1]:
            raise ValueError(
                f"load_balancing_loss: attention_mask has shape {list(attention_mask.shape)}, needed "
                f"{list(logits.shape[:-1])}"
            )
    if layer_wise:
        return torch.stack([_balance([one], topk, attention_mask) for one in layers]).mean()
    return _balance(layers, topk, attention_mask)


def _balance(layers: list[Tensor], topk: int, attention_mask: Tensor | None) -> Tensor:
    memories = layers[0].shape[-1]
    p = torch.cat([probabilities(logits).reshape(-1, memories) for logits in layers])
    chosen = torch.sort(p.detach(), dim=-1, descending=True, stable=True).indices[:, :topk]
    counts = p.new_ones(p.shape[0])
    if attention_mask is not None:
        counts = (attention_mask != 0).reshape(-1).to(p.dtype).repeat(len(layers))
    tokens = counts.sum().clamp(min=1)
    # [R, k, M] one-hot choices, summed over tokens and slots
    share = (F.one_hot(chosen, memories).sum(1).to(p.dtype) * counts[:, None]).sum(0) / tokens
    mean = (p * counts[:, None]).sum(0) / tokens
    return memories * (share * mean).sum()
