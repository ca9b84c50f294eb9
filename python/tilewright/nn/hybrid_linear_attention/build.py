# SPDX-License-Identifier: Apache-2.0
"""Hybrid stacks by mixer and ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tilewright.nn.hybrid_linear_attention.layout import Placement, attention_layers

if TYPE_CHECKING:
    from tilewright.nn.hybrid_linear_attention.configuration import HybridConfig
    from tilewright.nn.hybrid_linear_attention.modeling import HybridForCausalLM


def hybrid_config(
    mixer: str,
    ratio: str | Sequence[int] = "3:1",
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    vocab_size: int,
    placement: Placement = "last",
    mixer_options: dict[str, Any] | None = None,
    attention_options: dict[str, Any] | None = None,
    **config: Any,
) -> HybridConfig:
    """The configuration of :func:`build_hybrid`."""
    from tilewright.nn.hybrid_linear_attention.configuration import HybridConfig

    layers = attention_layers(ratio, num_layers, placement)
    return HybridConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_heads=num_heads,
        mixer=mixer,
        mixer_options=mixer_options,
        attn={"layers": layers, **(attention_options or {})} if layers else None,
        **config,
    )


def build_hybrid(mixer: str, ratio: str | Sequence[int] = "3:1", **options: Any) -> HybridForCausalLM:
    """A language model of linear mixers with softmax layers among them, newly initialised.

    Args:
        mixer: name of the linear mixer (``tilewright.nn.mixers.discover()`` lists them).
        ratio: "r:1", "pure", "full" or indices, see :func:`tilewright.nn.hybrid_linear_attention.attention_layers`.
        options: num_layers, hidden_size, num_heads, vocab_size; placement ("last", "middle", "first" in each group);
            mixer_options and attention_options (keyword arguments of the layers); all else goes to
            :class:`tilewright.nn.HybridConfig`.

    Example:
        >>> model = build_hybrid("gla", "3:1", num_layers=4, hidden_size=64, num_heads=2, vocab_size=256)
        >>> model.config.layer_names
        ['gla', 'gla', 'gla', 'softmax']

    Raises:
        ValueError: a name, ratio, size or option does not fit.
        ImportError: transformers is not installed (``pip install tilewright[models]``).
    """
    from tilewright.nn.hybrid_linear_attention.modeling import HybridForCausalLM

    return HybridForCausalLM(hybrid_config(mixer, ratio, **options))
