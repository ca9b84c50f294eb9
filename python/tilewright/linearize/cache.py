# SPDX-License-Identifier: Apache-2.0
"""The memory of a converted layer inside transformers' caches, so that ``generate()`` works as for any model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer


class StateLayer(CacheLayerMixin):
    """Named tensors, each with the batch as first dimension, and the number of positions they stand for.

    It takes the place of a cache's still empty layer (:func:`state_layer`), beside the layers of attention that was
    kept; its size need not grow with the positions.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.seen = 0

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {list(t.shape)}" for name, t in self.tensors.items())
        return f"StateLayer({self.seen} positions; {sizes})"

    def get(self, name: str) -> Tensor | None:
        """A tensor, or None before the first :meth:`put` of it."""
        return self.tensors.get(name)

    def put(self, tokens: int, **tensors: Tensor) -> None:
        """Exchange tensors after ``tokens`` more positions. They are kept without their autograd history."""
        self.tensors |= {name: tensor.detach() for name, tensor in tensors.items()}
        self.seen += tokens
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def lazy_initialization(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to do: tensors come with :meth:`put`."""

    def update(self, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not for this layer: it holds no keys and values of all positions."""
        raise TypeError("StateLayer: softmax attention asked for the cache of a linearized layer; use a new cache")

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Positions that a mask must cover, and the first of them: the same as for a layer that keeps everything."""
        more = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + more, 0

    def get_seq_length(self, *_args: Any) -> int:
        """Positions so far, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.tensors, self.seen, self.is_initialized = {}, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.tensors = {name: t.repeat_interleave(repeats, 0) for name, t in self.tensors.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.tensors = {name: t[indices.to(t.device)] for name, t in self.tensors.items()}

    def crop(self, tokens_to_remove: int) -> None:
        """Refused unless nothing is to be taken back: a state has no way back."""
        if tokens_to_remove:
            raise ValueError(
                "StateLayer: a recurrent state cannot give tokens back; assisted decoding needs a model "
                "that was not linearized"
            )

    def offload(self) -> None:
        """Move to the CPU."""
        self.tensors = {name: t.to("cpu", non_blocking=True) for name, t in self.tensors.items()}

    def prefetch(self) -> None:
        """Tensors go to their device where they are used."""


def state_layer(cache: Cache, index: int) -> StateLayer:
    """The state of layer ``index``; an empty growing layer of the cache is exchanged for one.

    Raises:
        TypeError: the cache is not one of transformers' with exchangeable layers (a DynamicCache is).
        ValueError: the layer already holds keys and values of softmax attention.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise TypeError(f"cache is a {type(cache).__name__}; a linearized layer needs transformers' DynamicCache")
    while len(layers) <= index:
        layers.append(DynamicLayer())
    found = layers[index]
    if isinstance(found, StateLayer):
        return found
    if not isinstance(found, DynamicLayer):
        raise TypeError(
            f"layer {index} of the {type(cache).__name__} is a {type(found).__name__}; a linearized layer needs "
            "transformers' DynamicCache"
        )
    if found.get_seq_length():
        raise ValueError(f"layer {index} of the cache already holds keys and values; use a new cache")
    layers[index] = StateLayer()
    return layers[index]


def state_nbytes(cache: Cache) -> int:
    """Bytes that a cache holds, whatever its layers are."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            total += layer.nbytes
            continue
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0
    return total
