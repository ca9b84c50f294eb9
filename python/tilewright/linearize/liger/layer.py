# SPDX-License-Identifier: Apache-2.0
"""Liger's layer as a token mixer, for models that are trained with it from the start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tilewright.linearize.liger.config import LigerConfig
from tilewright.linearize.liger.method import liger_attention
from tilewright.models.rope import rope_frequencies
from tilewright.nn.mixer import Mixer, MixerMode, Sequences, heads_of
from tilewright.ops.sequence import piece


class LigerLinearAttention(Mixer):
    """``o = alpha y + beta y_window``: gated recurrence with the key as gate, and rotary softmax over a window.

    Args:
        hidden_size: D.
        num_heads: H, of the queries.
        num_kv_heads: of keys, values and states, a divisor of H; H when None.
        variant, window_size, alpha, beta, gate_logit_normalizer, pool, normalize: as in
            :class:`tilewright.linearize.liger.LigerConfig`.
        rope_theta: base of the rotary frequencies of the window.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads of even size, or an option is out of range.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 8,
        *,
        num_kv_heads: int | None = None,
        variant: str = "gla",
        window_size: int = 64,
        alpha: float = 0.5,
        beta: float = 0.5,
        gate_logit_normalizer: float = 16.0,
        pool: str | int = "identity",
        normalize: bool = False,
        rope_theta: float = 10000.0,
        layer_idx: int = 0,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        name = type(self).__name__
        self.head_dim = heads_of(name, "hidden_size", hidden_size, num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"{name}: num_heads = {num_heads} is not a multiple of num_kv_heads = {num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"{name}: heads of {self.head_dim}; rotary positions need an even number")
        self.liger = LigerConfig(variant, window_size, alpha, beta, gate_logit_normalizer, pool, normalize)
        if not isinstance(pool, str) and self.head_dim % pool:
            raise ValueError(f"{name}: pool = {pool} does not divide the head size {self.head_dim}")
        self.rope_theta = rope_theta
        narrow = self.num_kv_heads * self.head_dim
        self.q_proj, self.o_proj = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(hidden_size, narrow, bias=False) for _ in range(2))

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`tilewright.nn.mixer.Mixer.mix`. Packed sequences become rows with padding in front."""
        if piece() is not None:
            raise ValueError("LigerLinearAttention: a sequence cut over processes has no window; give whole sequences")
        real, positions = None, sequences.positions
        if sequences.cu_seqlens is not None:
            real = _places(sequences.cu_seqlens)
            x, positions = _spread(x[0], real), _spread(positions[0], real)
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q_proj, self.k_proj, self.v_proj))
        wide = torch.promote_types(x.dtype, torch.float32)
        turn = positions[..., None].to(wide) * rope_frequencies(self.rope_theta, self.head_dim, None).to(x.device, wide)
        turn = torch.cat([turn, turn], -1)
        held = _Held(state) if keep_state or state else None
        out = liger_attention(
            q, k, v, cos=turn.cos(), sin=turn.sin(), config=self.liger, real=real, state=held,
            mode="recurrent" if self._recurrent(x.shape[1]) else "chunk",
        )  # fmt: skip
        y = self.o_proj(out.flatten(2).to(x.dtype))
        return y if real is None else y[real][None], held.tensors if held is not None and keep_state else {}

    def flops_per_token(self, context_length: int) -> float:
        """3 K V a key head to decay and write, 2 K V a query head to read, and 4 K a head and token in the window."""
        square, window = self.head_dim**2, min(self.liger.window_size, context_length)
        seen = window * (window + 1) / 2 + window * (context_length - window)
        local = 4.0 * self.num_heads * self.head_dim * seen / max(context_length, 1)
        return 3.0 * self.num_kv_heads * square + 2.0 * self.num_heads * square + local

    def state_elements(self, context_length: int) -> dict[str, int]:
        """The states of a key head, and the window's keys and values with a flag for each."""
        liger, heads, size = self.liger, self.num_kv_heads, self.head_dim
        found: dict[str, int] = {}
        slots = liger.pool if liger.variant == "gsa" and not isinstance(liger.pool, str) else size
        if liger.alpha:
            found["recurrent_state"] = heads * slots * (size + int(liger.normalize))
            found |= {"slot_keys": heads * slots * size} if liger.variant == "gsa" else {}
        if liger.beta:
            kept = min(context_length, liger.window_size - 1)
            found |= {"window_keys": heads * size * kept, "window_values": heads * size * kept, "window_real": kept}
        return found


class _Held:
    """A mapping of tensors behind the interface of :class:`tilewright.linearize.cache.StateLayer`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def put(self, tokens: int, **tensors: Tensor) -> None:
        del tokens  # the cache counts
        self.tensors |= tensors


def _places(cu_seqlens: Tensor) -> Tensor:
    """bool [N, longest]: where the tokens of each sequence stand when padding is in front."""
    lengths = cu_seqlens.to(torch.int64).diff()
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=lengths.device) >= longest - lengths[:, None]


def _spread(rows: Tensor, real: Tensor) -> Tensor:
    """Packed rows [T, ...] as [N, longest, ...], zero at padding."""
    out = rows.new_zeros(*real.shape, *rows.shape[1:])
    out[real] = rows
    return out
