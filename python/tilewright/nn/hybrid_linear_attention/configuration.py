# SPDX-License-Identifier: Apache-2.0
"""The configuration of a language model that mixes any token mixers, layer by layer."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from tilewright.nn import mixers
from tilewright.nn.hybrid_linear_attention.layout import attention_layers

_ATTENTION_KEYS = (
    "layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "window_size",
    "rope_theta",
    "qk_norm",
    "norm_eps",
)


class HybridConfig(PretrainedConfig):
    """A stack of pre-norm blocks, each a token mixer and a SwiGLU feed-forward.

    Which mixer a layer has is said in one of two ways:

    * ``mixer`` for all layers, and softmax attention at ``attn["layers"]`` (the dictionary of flash-linear-attention);
    * ``pattern``, a list of names or of ``{"mixer": name, option: value}``, repeated to the number of layers.

    Example:
        >>> HybridConfig(mixer="gated_deltanet", num_hidden_layers=4, attn={"layers": [3]}).layer_names
        ['gated_deltanet', 'gated_deltanet', 'gated_deltanet', 'softmax']
        >>> HybridConfig(pattern=["kda", "kda", "kda", "softmax"], num_hidden_layers=8).layer_names[3::4]
        ['softmax', 'softmax']

    Args:
        vocab_size, hidden_size, num_hidden_layers: V, D, L.
        num_heads: H of every mixer that does not say otherwise.
        mixer: a name known to :func:`tilewright.nn.mixers.find`.
        mixer_options: keyword arguments of that mixer.
        attn: "layers" (indices, or a ratio "r:1"), and options of :class:`tilewright.nn.SoftmaxAttention`.
        pattern: instead of ``mixer`` and ``attn``.
        intermediate_size: of the feed-forward; 8/3 D, rounded up to a multiple of 32, when None.
        norm_eps: of the blocks' norms.
        initializer_range: standard deviation of linears and embeddings at the start.
        tie_word_embeddings: the output head shares the embedding's matrix.
        use_cache: keep states between calls outside training.

    Raises:
        ValueError: a mixer, a layer index or an option of ``attn`` is unknown, or sizes are not positive.
    """

    model_type = "tilewright_hybrid"
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_heads: int = 8,
        mixer: str = "gated_deltanet",
        mixer_options: dict[str, Any] | None = None,
        attn: dict[str, Any] | None = None,
        pattern: list[str | dict[str, Any]] | None = None,
        intermediate_size: int | None = None,
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if min(vocab_size, hidden_size, num_hidden_layers, num_heads) < 1:
            raise ValueError(
                f"HybridConfig: vocab_size = {vocab_size}, hidden_size = {hidden_size}, num_hidden_layers = "
                f"{num_hidden_layers}, num_heads = {num_heads}; all must be at least 1"
            )
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_heads = num_hidden_layers, num_heads
        self.mixer, self.mixer_options = mixer, dict(mixer_options or {})
        self.attn, self.pattern = attn, pattern
        self.intermediate_size = intermediate_size or 32 * -(-8 * hidden_size // 96)
        self.norm_eps, self.initializer_range, self.use_cache = norm_eps, initializer_range, use_cache
        for name in self.layer_names:
            mixers.find(name)
        tokens = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **tokens, **kwargs})

    @property
    def layer_specs(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of each layer's mixer."""
        if self.pattern is not None:
            return self._from_pattern(self.pattern)
        attn = dict(self.attn or {})
        if unknown := sorted(attn.keys() - set(_ATTENTION_KEYS)):
            raise ValueError(f"HybridConfig: attn has the key {unknown[0]!r}; known are {', '.join(_ATTENTION_KEYS)}")
        full = set(attention_layers(attn.pop("layers", []), self.num_hidden_layers))
        linear = (self.mixer, self.mixer_options)
        return [("softmax", attn) if index in full else linear for index in range(self.num_hidden_layers)]

    @property
    def layer_names(self) -> list[str]:
        """Name of each layer's mixer."""
        return [name for name, _ in self.layer_specs]

    def _from_pattern(self, pattern: list[str | dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
        if not pattern or self.num_hidden_layers % len(pattern):
            raise ValueError(
                f"HybridConfig: a pattern of {len(pattern)} layers does not repeat to num_hidden_layers = "
                f"{self.num_hidden_layers}"
            )
        specs = []
        for entry in pattern:
            options = {"mixer": entry} if isinstance(entry, str) else dict(entry)
            if "mixer" not in options:
                raise ValueError(f"HybridConfig: the pattern's entry {entry!r} names no 'mixer'")
            specs.append((options.pop("mixer"), options))
        return specs * (self.num_hidden_layers // len(pattern))
