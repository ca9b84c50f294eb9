# SPDX-License-Identifier: Apache-2.0
"""Attention by feature maps in the place of softmax: for any model, and for transformers' language models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.linearize.attention import ConvertedAttention, base_attention, rotate
from tilewright.linearize.hedgehog.config import HedgehogConfig
from tilewright.nn.hedgehog import (
    ELUFeatureMap,
    HedgehogFeatureMap,
    PerformerFeatureMap,
    ReLUFeatureMap,
    WindowState,
    hedgehog_attention,
    windowed_hedgehog_attention,
)
from tilewright.nn.hedgehog.attention import repeat_heads
from tilewright.nn.hedgehog.feature_maps import Activation

if TYPE_CHECKING:
    from tilewright.linearize.cache import StateLayer

Observer = Callable[["FeatureAttention", Tensor, Tensor, Tensor, "Tensor | None"], None]
"""Called with the module, q, k, v and the mask of each call while the softmax teacher answers."""


class FeatureAttention(nn.Module):
    """Softmax attention's stand-in between the projections: weights ``phi_q(q_i) . phi_k(k_j)``, one phi a head.

    While :func:`softmax_teacher` holds, it answers with the softmax attention that it is to imitate, so that a model
    around it computes what it did before conversion.

    Args:
        head_dim: D. num_heads: H. num_key_value_heads: H_kv, H unless given.
        config: settings; a window needs ``causal``.
        causal: row i reads keys j <= i.
        scale: of the teacher's logits (and of the window's), ``D^-1/2`` unless given.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        config: HedgehogConfig | None = None,
        *,
        causal: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        config = HedgehogConfig() if config is None else config
        if config.window_size is not None and not causal:
            raise ValueError(f"window_size={config.window_size} with causal=False: the window is of causal attention")
        key_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        self.config, self.causal = config, causal
        self.scale = head_dim**-0.5 if scale is None else scale
        self.phi_q = _feature_map(config, head_dim, num_heads, "query")
        self.phi_k = _feature_map(config, head_dim, num_heads if config.key_maps == "query_heads" else key_heads, "key")
        windowed = config.window_size is not None
        self.mix_logit = nn.Parameter(torch.full((num_heads,), config.mix_logit)) if windowed else None
        self.observer: Observer | None = None

    @property
    def mix(self) -> Tensor | None:
        """The window's weight of each head, [H], in (0, 1)."""
        return None if self.mix_logit is None else self.mix_logit.sigmoid()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        state: Tensor | WindowState | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | WindowState | None]:
        """q [B, T, H, D], k and v [B, T, H_kv, ...], mask [B, T] (0 at padding): o [B, T, H, V] and the state or None.

        Raises:
            ValueError: a state is asked for while the softmax teacher answers, which has none.
        """
        if self.observer is not None:
            if state is not None or output_final_state:
                raise ValueError("the softmax teacher keeps no state; call the model without a cache (use_cache=False)")
            self.observer(self, q, k, v, mask)
            return softmax_attention(q, k, v, causal=self.causal, scale=self.scale, mask=mask), None
        common: dict[str, Any] = {
            "phi_q": self.phi_q,
            "phi_k": self.phi_k,
            "attention_mask": mask,
            "output_final_state": output_final_state,
            "mode": "recurrent" if q.shape[1] == 1 else "chunk",
        }
        if self.config.window_size is None:
            return hedgehog_attention(q, k, v, causal=self.causal, initial_state=cast("Tensor | None", state), **common)
        past, window = cast("WindowState | None", state), self.config.window_size
        mix = cast(Tensor, self.mix)
        return windowed_hedgehog_attention(q, k, v, mix=mix, window=window, scale=self.scale, past=past, **common)

    def extra_repr(self) -> str:
        return f"causal={self.causal}, window_size={self.config.window_size}"


def _feature_map(config: HedgehogConfig, head_dim: int, heads: int, role: Any) -> nn.Module:
    if config.feature_map == "elu":
        return ELUFeatureMap(head_dim, heads)
    if config.feature_map == "relu":
        return ReLUFeatureMap(head_dim, heads)
    if config.feature_map == "performer":
        count = None if config.feature_dim is None else 2 * config.feature_dim
        return PerformerFeatureMap(head_dim, count, heads, role)
    activation, init = cast(Activation, config.activation), cast(Any, config.init)
    return HedgehogFeatureMap(head_dim, config.feature_dim, heads, activation, config.bias, init)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, mask: Tensor | None = None
) -> Tensor:
    """The teacher: [B, T, H, D] inputs, keys of H_kv heads repeated; a row without a visible key reads itself."""
    heads = q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, repeat_heads(k, heads), repeat_heads(v, heads)))
    seen = None
    if mask is not None:
        tokens = q.shape[2]
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
        seen = (seen.tril() if causal else seen) & mask[:, None, None, :].bool()
        seen = seen | torch.eye(tokens, dtype=torch.bool, device=q.device)
    out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal and seen is None, scale=scale)
    return out.transpose(1, 2)


def feature_attentions(model: nn.Module) -> dict[str, FeatureAttention]:
    """All such modules of a model, by name.

    Raises:
        ValueError: there is none.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, FeatureAttention)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no Hedgehog attention; convert it first (convert_to_hedgehog)")
    return found


@contextlib.contextmanager
def softmax_teacher(model: nn.Module, observer: Observer | None = None) -> Iterator[dict[str, FeatureAttention]]:
    """While the context lives, every :class:`FeatureAttention` answers as softmax and shows ``observer`` its inputs."""
    found = feature_attentions(model)
    for attention in found.values():
        attention.observer = observer or (lambda *_: None)
    try:
        yield found
    finally:
        for attention in found.values():
            attention.observer = None


class HedgehogAttention(ConvertedAttention):
    """Hedgehog in the place of a Llama-type model's attention: its projections, and feature maps after the rotation.

    Args:
        config: a transformers configuration (new projections are made) or one of transformers' attention modules
            (its projections are taken over).
        layer_idx: of the layer, with a configuration.
        settings: fields of :class:`HedgehogConfig`, or ``hedgehog=`` one of them.

    Raises:
        ValueError: the architecture cannot be converted, or a setting is not allowed.
    """

    def __init__(
        self, config: Any, layer_idx: int | None = None, *, hedgehog: HedgehogConfig | None = None, **settings: Any
    ) -> None:
        super().__init__(config if isinstance(config, nn.Module) else base_attention(config, layer_idx or 0))
        self.hedgehog = HedgehogConfig(**settings) if hedgehog is None else hedgehog
        device = next(self.parameters()).device
        heads = self.num_key_value_heads
        self.features = FeatureAttention(self.head_dim, self.num_heads, heads, self.hedgehog, scale=self.scaling)
        self.features.to(device)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, real: Tensor | None, state: StateLayer | None
    ) -> Tensor:
        """:class:`FeatureAttention` on rotated queries and keys; the state's size does not grow."""
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        held = None if state is None else self._held(state)
        out, new = self.features(q, k, v, real, held, state is not None)
        if state is not None:
            names = _WINDOWED if isinstance(new, WindowState) else _WINDOWED[:1]
            tensors = new if isinstance(new, WindowState) else (cast(Tensor, new),)
            state.put(q.shape[1], **dict(zip(names, tensors, strict=True)))
        return cast(Tensor, out)

    def _held(self, state: StateLayer) -> Tensor | WindowState | None:
        first = state.get(_WINDOWED[0])
        if first is None or self.hedgehog.window_size is None:
            return first
        return WindowState(*(cast(Tensor, state.get(name)) for name in _WINDOWED))


_WINDOWED = ("recurrent_state", "window_keys", "window_values", "window_real")


def attention(base: nn.Module, config: HedgehogConfig) -> HedgehogAttention:
    """The converted module with the base layer's projections."""
    return HedgehogAttention(base, hedgehog=config)
