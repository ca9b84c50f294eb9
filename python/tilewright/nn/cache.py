# SPDX-License-Identifier: Apache-2.0
"""What token mixers keep between calls: recurrent states, convolution windows, keys and values, in one object."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

TIME_INDEXED = ("key", "value")
"""Names whose tensors are [B, H, T, D]: one row a token, so that the last tokens can be taken off again."""


class LayerCache(dict[str, Tensor]):
    """Named tensors of one layer, batch first, and how many tokens the layer has seen.

    ``recurrent_state`` [B, H, K, V], ``conv_state`` [B, C, W - 1], ``key`` and ``value`` [B, H, T, D]; a mixer may
    use other names. Tensors named in :data:`TIME_INDEXED` have one row a token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen_tokens = 0


class MixerCache:
    """The caches of all layers of a model, for any mix of mixers, and for ``generate()`` of transformers.

    A mixer reads ``cache[layer_idx]`` (an empty :class:`LayerCache` before the first call) and writes with
    :meth:`update`. Every tensor has the batch as its first dimension, which is what beam search reorders.

    Example:
        >>> cache = MixerCache()
        >>> cache.update(0, 3, recurrent_state=torch.zeros(2, 4, 8, 8))
        >>> cache.get_seq_length(), sorted(cache[0])
        (3, ['recurrent_state'])
    """

    is_compileable = False
    """``generate()`` compiles a model by itself only when this holds; tensors here grow and are replaced."""

    def __init__(self) -> None:
        self.layers: list[LayerCache] = []

    def __getitem__(self, layer_idx: int) -> LayerCache:
        """The layer's tensors; layers up to this one come into being empty."""
        if layer_idx < 0:
            raise IndexError(f"MixerCache: layer_idx = {layer_idx}, needed 0 or more")
        while len(self.layers) <= layer_idx:
            self.layers.append(LayerCache())
        return self.layers[layer_idx]

    def __len__(self) -> int:
        return len(self.layers)

    def update(self, layer_idx: int, tokens: int, **tensors: Tensor) -> LayerCache:
        """Replace the named tensors of a layer, which has seen ``tokens`` more; others stay as they are."""
        layer = self[layer_idx]
        layer.update(tensors)
        layer.seen_tokens += tokens
        return layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by a layer."""
        return self.layers[layer_idx].seen_tokens if layer_idx < len(self.layers) else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no greatest length."""
        del layer_idx
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of the attention mask that covers the past and ``query_length`` new tokens, and its offset, 0."""
        return self.get_seq_length(layer_idx) + query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        """In transformers' sense, layers that do not count their tokens: none here."""
        return [False] * max(1, len(self.layers))

    @property
    def is_sliding(self) -> list[bool]:
        """Layers that have forgotten keys which left their window."""
        return [any(n in TIME_INDEXED and t.shape[-2] < c.seen_tokens for n, t in c.items()) for c in self.layers]

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 before the first token."""
        return next((t.shape[0] for t in self._tensors()), -1)

    @property
    def nbytes(self) -> int:
        """Bytes held at present."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def reset(self) -> None:
        """Forget everything."""
        self.layers.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes the former row ``beam_idx[b]`` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        for layer in self.layers:
            for name, tensor in layer.items():
                layer[name] = tensor.index_select(0, indices.to(tensor.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch in place."""
        for layer in self.layers:
            for name, tensor in layer.items():
                layer[name] = tensor.repeat_interleave(repeats, dim=0)

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken off: only keys and values, none of which has left its window."""
        return all(self._why_not_croppable(index) is None for index in range(len(self.layers)))

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens off (transformers' sign: a number <= 0).

        Raises:
            ValueError: the number is positive, or larger than what was seen.
            RuntimeError: a layer keeps a recurrent state, a convolution window or a sliding window that has
                forgotten tokens: what they absorbed cannot be taken out again.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"MixerCache.crop: tokens_to_remove = {tokens_to_remove}, needed 0 or a negative number")
        if tokens_to_remove == 0:
            return
        for index, layer in enumerate(self.layers):
            if -tokens_to_remove > layer.seen_tokens:
                raise ValueError(
                    f"MixerCache.crop: {-tokens_to_remove} tokens to remove, layer {index} has seen {layer.seen_tokens}"
                )
            if why := self._why_not_croppable(index):
                raise RuntimeError(
                    f"MixerCache.crop: layer {index} {why}; copy the cache (copy.deepcopy) before the tokens "
                    "that may be taken back"
                )
        for layer in self.layers:
            for name, tensor in layer.items():
                layer[name] = tensor[..., :tokens_to_remove, :]
            layer.seen_tokens += tokens_to_remove

    def _why_not_croppable(self, index: int) -> str | None:
        layer = self.layers[index]
        if absorbing := sorted(layer.keys() - set(TIME_INDEXED)):
            return f"keeps {', '.join(absorbing)}, which cannot go back in time"
        if any(t.shape[-2] < layer.seen_tokens for t in layer.values()):
            return "has a sliding window, which has forgotten tokens"
        return None

    def _tensors(self) -> Iterable[Tensor]:
        return (tensor for layer in self.layers for tensor in layer.values())

    def __repr__(self) -> str:
        held = [{name: list(t.shape) for name, t in layer.items()} for layer in self.layers]
        return f"MixerCache(seen_tokens={self.get_seq_length()}, layers={held})"
