# SPDX-License-Identifier: Apache-2.0
"""What every token mixer with a state shares: the calling convention, padding, packed sequences, caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.nn.cache import MixerCache
from tilewright.nn.short_convolution import ShortConvolution
from tilewright.ops.sequence import piece

MixerMode = Literal["auto", "chunk", "recurrent"]
MAX_KEY_SIZE = 256


@dataclass(frozen=True)
class Sequences:
    """How the tokens of a call form sequences.

    cu_seqlens: int64 [N + 1] where B = 1 holds N packed sequences; None: one sequence a row.
    positions: int64 [B, T] or [1, T], the place of each token in its sequence, cached tokens counted.
    """

    cu_seqlens: Tensor | None
    positions: Tensor


class Mixer(nn.Module):
    """A token mixer [B, T, D] -> [B, T, D] that carries named states from one call to the next.

    A subclass implements :meth:`mix`. This class turns the padding of a batch into packed sequences, so that padding
    anywhere changes nothing: tokens after it see the states that the tokens before it left.

    Args:
        hidden_size: D.
        num_heads: H.
        layer_idx: where the layer's states lie in a :class:`tilewright.nn.MixerCache`.
        mode: "chunk" or "recurrent" operators, or "auto": recurrent for a single token.
    """

    lower_bound_size: int | None = None
    """Width of the forget gate's lower bound, which the model hands to the mixer (HGRN, HGRN2)."""

    def __init__(self, hidden_size: int, num_heads: int, layer_idx: int = 0, mode: MixerMode = "auto") -> None:
        super().__init__()
        if hidden_size < 1 or num_heads < 1 or layer_idx < 0:
            raise ValueError(
                f"{type(self).__name__}: hidden_size = {hidden_size}, num_heads = {num_heads}, "
                f"layer_idx = {layer_idx}; needed sizes of at least 1 and a layer_idx of at least 0"
            )
        if mode not in ("auto", "chunk", "recurrent"):
            raise ValueError(f"{type(self).__name__}: mode = {mode!r}, needed 'auto', 'chunk' or 'recurrent'")
        self.hidden_size, self.num_heads, self.layer_idx = hidden_size, num_heads, layer_idx
        self.mode: MixerMode = mode

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One call without padding.

        Args:
            x: [B, T, D], B = 1 where sequences are packed.
            state: what the last call returned, tensors with the N sequences first; empty at the beginning.
            sequences: see there.
            keep_state: whether the states after the last tokens are wanted.

        A mixer with a ``lower_bound_size`` takes ``lower_bound`` besides, a tensor of that many numbers or None.

        Returns:
            [B, T, D] and the new states, which may be empty when they are not wanted.
        """
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the parameters that are the mixer's own; its linears, norms and convolutions have theirs."""
        del generator

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, MixerCache | None]:
        """Mix tokens.

        Args:
            hidden_states: [B, T, D].
            attention_mask: [B, T], or [B, past + T] whose last T columns count; 0 marks padding.
            past_key_values: states of the tokens before; read, and brought up to date.
            use_cache: make a cache where none is given.
            cu_seqlens: int [N + 1], boundaries of packed sequences (B = 1).
            position_ids: [B, T] or [1, T]; counted from the cache and the boundaries when None.
            kwargs: ``lower_bound`` for mixers that have one; all else is ignored.

        Returns:
            [B, T, D] (zero at padding), None (there are no attention weights), and the cache.

        Raises:
            ValueError: a shape does not fit, or packed sequences come with padding or with a cache.
        """
        batch, tokens = self._check(hidden_states, cu_seqlens, past_key_values, use_cache, attention_mask)
        cache = MixerCache() if past_key_values is None and use_cache else past_key_values
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        positions = default_positions(hidden_states, seen, cu_seqlens) if position_ids is None else position_ids
        state: Mapping[str, Tensor] = {} if cache is None else cache[self.layer_idx]
        keep = current_columns(attention_mask, tokens)
        options: dict[str, Any] = {"keep_state": cache is not None}
        if self.lower_bound_size is not None:
            options["lower_bound"] = kwargs.get("lower_bound")
        if keep is None:
            y, new = self.mix(hidden_states, state, Sequences(cu_seqlens, positions), **options)
        else:
            index, lengths = packing(keep)
            rows = hidden_states.flatten(0, 1)[index][None]
            places = positions.expand(batch, tokens).flatten()[index][None]
            packed, new = self.mix(rows, state, Sequences(lengths, places), **options)
            y = torch.zeros_like(hidden_states, dtype=packed.dtype).flatten(0, 1)
            y = y.index_copy(0, index, packed[0]).view_as(hidden_states)
        if cache is not None:
            cache.update(self.layer_idx, tokens, **new)
        return y, None, cache

    def _check(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        cache: MixerCache | None,
        use_cache: bool,
        attention_mask: Tensor | None,
    ) -> tuple[int, int]:
        name = type(self).__name__
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"{name}: hidden_states has shape {list(x.shape)}, needed [B, T, {self.hidden_size}]")
        if cu_seqlens is not None:
            check_packed(name, x, cu_seqlens, attention_mask, cache is not None or use_cache)
        return x.shape[0], x.shape[1]

    def _recurrent(self, tokens: int) -> bool:
        """Whether the operators shall go token by token."""
        return self.mode == "recurrent" or (self.mode == "auto" and tokens == 1)

    def flops_per_token(self, context_length: int) -> float:
        """Multiplies and adds of the recurrence for one token (no projections, norms, gates or convolutions)."""
        raise NotImplementedError(f"{type(self).__name__} does not state its cost; implement flops_per_token()")

    def state_elements(self, context_length: int) -> dict[str, int]:
        """Numbers kept for one sequence of this length, by the names in the cache."""
        raise NotImplementedError(f"{type(self).__name__} does not state its size; implement state_elements()")


def check_packed(name: str, x: Tensor, cu_seqlens: Tensor, attention_mask: Tensor | None, cached: bool) -> None:
    """Raise where packed sequences come with what they cannot come with."""
    if x.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{name}: cu_seqlens has shape {list(cu_seqlens.shape)} and hidden_states {list(x.shape)}; "
            "packed sequences need [N + 1] and [1, T, D]"
        )
    if attention_mask is not None:
        raise ValueError(
            f"{name}: cu_seqlens came with attention_mask; leave the padding out of the packed row instead"
        )
    if cached:
        raise ValueError(
            f"{name}: cu_seqlens came with a cache; for generation give a padded batch with attention_mask"
        )


def default_positions(x: Tensor, seen: int, cu_seqlens: Tensor | None) -> Tensor:
    """int64 [1, T]: columns counted on from the cached ones, or from the start of each packed sequence."""
    place = torch.arange(x.shape[1], device=x.device)
    if (here := piece()) is not None:
        seen += here.offset(x.shape[1])
    if cu_seqlens is None:
        return (place + seen)[None]
    cu = cu_seqlens.to(torch.int64)
    return (place - torch.repeat_interleave(cu[:-1], cu.diff(), output_size=x.shape[1]))[None]


def current_columns(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """The last T columns of a mask as bool [B, T], or None where nothing is masked."""
    if attention_mask is None or tokens == 0:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, needed [B, T] with at least T = {tokens} columns"
        )
    keep = attention_mask[:, -tokens:].bool()
    return None if bool(keep.all()) else keep


def packing(keep: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, T] to the flat indices of the kept tokens, and the boundaries int64 [B + 1] of the rows among them."""
    return keep.flatten().nonzero().flatten(), F.pad(keep.sum(1).cumsum(0), (1, 0))


def heads_of(name: str, what: str, size: float, num_heads: int, largest: int | None = None) -> int:
    """size / num_heads, which must be whole and, for keys, no more than the kernels take."""
    whole = round(size)
    if whole < 1 or abs(size - whole) > 1e-6 or whole % num_heads:
        raise ValueError(f"{name}: {what} = {size:g} is not a multiple of num_heads = {num_heads}")
    if largest is not None and whole // num_heads > largest:
        raise ValueError(
            f"{name}: {what} = {whole} over num_heads = {num_heads} gives {whole // num_heads} a head, "
            f"at most {largest} are supported; take more heads"
        )
    return whole // num_heads


def convolve(
    conv: ShortConvolution | None,
    streams: tuple[Tensor, ...],
    activation: Callable[[Tensor], Tensor],
    state: Mapping[str, Tensor],
    sequences: Sequences,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The streams [B, T, C_i] through one convolution over all their channels, or through the activation alone."""
    if conv is None:
        return tuple(activation(x) for x in streams), {}
    y, new = conv(torch.cat(streams, -1), state.get("conv_state"), sequences.cu_seqlens)
    return y.split([x.shape[-1] for x in streams], -1), {"conv_state": new}
