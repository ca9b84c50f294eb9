# SPDX-License-Identifier: Apache-2.0
"""A module that takes the place of softmax attention in a Llama-type model and keeps its projections.

The base layer is kept exactly: its projections with their biases, its q and k norms if it has them (Qwen3), a head
size that need not be hidden / heads. Only what happens between the projections differs, and that is a method's
:meth:`ConvertedAttention.attend`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tilewright.linearize.window import padding_first, put_back, take

if TYPE_CHECKING:
    from tilewright.linearize.cache import StateLayer

ATTENTION_CLASSES = {
    "llama": "LlamaAttention",
    "mistral": "MistralAttention",
    "qwen2": "Qwen2Attention",
    "qwen3": "Qwen3Attention",
}
"""Attention that can be converted, by transformers' model type."""


class ConvertedAttention(nn.Module):
    """Base of all converted layers; subclasses define :meth:`attend`.

    Args:
        attention: one of transformers' attention modules (:data:`ATTENTION_CLASSES`), whose submodules are taken over,
            so that parameters keep their names and values.

    Raises:
        ValueError: the module is of another class.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        require_known(attention)
        config: Any = attention.config
        self.config, self.layer_idx = config, int(attention.layer_idx)  # type: ignore[arg-type]
        self.head_dim = int(attention.head_dim)  # type: ignore[arg-type]
        self.num_heads = int(config.num_attention_heads)
        self.num_key_value_heads = int(config.num_key_value_heads)
        self.scaling = self.head_dim**-0.5
        # a linear layer, or an adapter around one
        self.q_proj: Any = attention.q_proj
        self.k_proj: Any = attention.k_proj
        self.v_proj: Any = attention.v_proj
        self.o_proj: Any = attention.o_proj
        self.q_norm: Any = getattr(attention, "q_norm", None)
        self.k_norm: Any = getattr(attention, "k_norm", None)

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_key_value_heads

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k and v [B, T, H_kv, D] as in the base layer, before rotary embedding."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, real: Tensor | None, state: StateLayer | None
    ) -> Tensor:
        """What replaces softmax attention.

        Args:
            q: [B, T, H, D] before rotary embedding.
            k, v: [B, T, H_kv, D], likewise.
            cos, sin: [B or 1, T, D], for :func:`rotate`.
            real: bool [B, T], False at padding; None: no padding. Padding is always in front of a row's tokens here
                (rows that come otherwise are reordered). It must not reach the state; what comes out at a padded
                position is of no account, but must be finite.
            state: what earlier positions left, to be continued and put back (:meth:`StateLayer.put`); None: the text
                begins here and nobody asks for the state.

        Returns:
            [B, T, H, D], any float type.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **_kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, width] to [B, T, width], and no attention weights.

        Args:
            position_embeddings: cos and sin, each [B or 1, T, D].
            attention_mask: what transformers hands to attention: None, [B, positions], or [B, 1, T, positions] boolean
                or additive. Only which positions are padding is read from it.
            cache, past_key_values: a transformers cache under its newer or older name, or None.

        Raises:
            ValueError: several texts in one row, or no position embeddings.
        """
        if position_embeddings is None:
            raise ValueError(f"{type(self).__name__}: position_embeddings (cos, sin) is None; both are needed")
        if position_ids is not None and bool((position_ids.diff(dim=-1) < 0).any()):
            raise ValueError(f"{type(self).__name__}: position_ids fall within a row; give each text a row of its own")
        cache = past_key_values if cache is None else cache
        state: StateLayer | None = None
        if cache is not None:
            from tilewright.linearize.cache import state_layer

            state = state_layer(cache, self.layer_idx)
        real = real_tokens(attention_mask, hidden_states.shape[1])
        order = None if real is None else padding_first(real)
        rows: tuple[Tensor, ...] = (*self.project(hidden_states), *position_embeddings)
        if order is not None and real is not None:
            real = take(real, order)
            rows = tuple(take(x.expand(len(order), *x.shape[1:]), order) for x in rows)
        q, k, v, cos, sin = rows
        out = self.attend(q, k, v, cos, sin, real, state)
        out = out if order is None else put_back(out, order)
        return self.o_proj(out.flatten(2).to(hidden_states.dtype)), None


def require_known(attention: nn.Module) -> None:
    """Raise ValueError, naming the class, unless attention of this class can be converted."""
    name = type(attention).__name__
    if name not in ATTENTION_CLASSES.values():
        raise ValueError(
            f"attention of class {name} cannot be converted; known are {', '.join(ATTENTION_CLASSES.values())}"
            + (
                " (convert the original model, not a converted one)"
                if isinstance(attention, ConvertedAttention)
                else ""
            )
        )


def base_attention(config: Any, layer_idx: int) -> nn.Module:
    """A new attention module of the architecture that ``config`` describes.

    Raises:
        ValueError: attention of this architecture cannot be converted.
    """
    kind = config.model_type
    if kind not in ATTENTION_CLASSES:
        raise ValueError(f"model type {kind!r} cannot be converted; known are {', '.join(ATTENTION_CLASSES)}")
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    made: nn.Module = getattr(module, ATTENTION_CLASSES[kind])(config, layer_idx)
    return made


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, H, D] by the angles of each position: x cos + (-x_2, x_1) sin, halves x_1, x_2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]


def real_tokens(mask: Tensor | None, tokens: int) -> Tensor | None:
    """bool [B, T]: which of the last ``tokens`` positions are no padding; None: all.

    In a causal mask [B, 1, T, L] the entry of a position with itself tells: it is open unless the position is padding.

    Raises:
        ValueError: a mask of another shape.
    """
    if mask is None:
        return None
    if mask.dim() == 4 and mask.shape[-2] == tokens and mask.shape[-1] >= tokens:
        own = mask[:, 0].diagonal(mask.shape[-1] - tokens, dim1=-2, dim2=-1)
        real = own if own.dtype == torch.bool else own == 0
    elif mask.dim() == 2 and mask.shape[1] >= tokens:
        real = mask[:, mask.shape[1] - tokens :].bool()
    else:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; [B, at least {tokens}] or [B, 1, {tokens}, positions] is "
            "needed"
        )
    return None if bool(real.all()) else real
