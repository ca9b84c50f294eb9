# SPDX-License-Identifier: Apache-2.0
"""The configuration of a language model whose linear layers are mixtures of memories."""

from __future__ import annotations

from typing import Any

from tilewright.nn.hybrid_linear_attention.configuration import HybridConfig

_LAYER = (
    "head_dim",
    "expand_v",
    "num_memories",
    "topk",
    "shared_mem",
    "single_kv_proj",
    "use_short_conv",
    "conv_size",
    "backend",
)


class MomConfig(HybridConfig):
    """A :class:`tilewright.nn.HybridConfig` whose mixer is :class:`tilewright.nn.MomAttention`.

    The defaults are the published 340M model's (24 layers of width 1024, 4 heads of 256, tied embeddings).

    Example:
        >>> config = MomConfig(hidden_size=64, num_hidden_layers=2, num_heads=2, head_dim=16)
        >>> config.layer_names, config.num_memories
        (['mom', 'mom'], 4)

    Args:
        head_dim, expand_v, num_memories, topk, shared_mem, single_kv_proj, use_short_conv, conv_size, backend: of
            every layer, see :class:`tilewright.nn.MomAttention`.
        aux_loss_scale: factor of the load-balancing loss in the training loss.
        use_layer_wise_balance: balance every layer by itself, instead of all layers together.
        attn: softmax layers among them, as in :class:`tilewright.nn.HybridConfig`.
        Others as there.

    Raises:
        ValueError: see :class:`tilewright.nn.HybridConfig`.
    """

    model_type = "tilewright_mom"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_heads: int = 4,
        head_dim: int = 256,
        expand_v: float = 1.0,
        num_memories: int = 4,
        topk: int = 2,
        shared_mem: bool = True,
        single_kv_proj: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        backend: str = "gated_delta_rule",
        aux_loss_scale: float = 0.01,
        use_layer_wise_balance: bool = False,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.head_dim, self.expand_v, self.num_memories, self.topk = head_dim, expand_v, num_memories, topk
        self.shared_mem, self.single_kv_proj, self.backend = shared_mem, single_kv_proj, backend
        self.use_short_conv, self.conv_size = use_short_conv, conv_size
        self.aux_loss_scale, self.use_layer_wise_balance = aux_loss_scale, use_layer_wise_balance
        # A stored configuration holds these too; they follow from the fields above.
        for derived in ("mixer", "mixer_options"):
            kwargs.pop(derived, None)
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_heads=num_heads,
            mixer="mom",
            mixer_options={name: getattr(self, name) for name in _LAYER},
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
