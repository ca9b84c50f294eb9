# SPDX-License-Identifier: Apache-2.0
"""Multi-scale retention, the layer of RetNet (Sun et al., arXiv 2307.08621)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tilewright import ops
from tilewright.nn.mixer import MAX_KEY_SIZE, Mixer, MixerMode, Sequences, heads_of
from tilewright.nn.norms import GatedRMSNorm
from tilewright.nn.rotary import apply_rotary


class MultiScaleRetention(Mixer):
    """``S <- gamma S + k v^T``, ``o = S^T q / sqrt(K)`` with ``gamma_h = 1 - 2^(-5-h)`` (eqs. 6 to 8).

    q and k are linear and carry rotary positions; each head is normalised and gated by ``SiLU(W_g x)``.

    Args:
        hidden_size: D.
        num_heads: H.
        expand_k, expand_v: width of all keys and of all values over D.
        rope_theta: base of the rotary frequencies.
        norm_eps: of the norm per head.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads of even width, or a head's keys are wider than 256.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 8,
        *,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        name = "MultiScaleRetention"
        self.head_k_dim = heads_of(name, "expand_k * hidden_size", expand_k * hidden_size, num_heads, MAX_KEY_SIZE)
        self.head_v_dim = heads_of(name, "expand_v * hidden_size", expand_v * hidden_size, num_heads)
        if self.head_k_dim % 2:
            raise ValueError(f"{name}: keys of {self.head_k_dim} a head; rotary positions need an even number")
        self.rope_theta = rope_theta
        keys, values = num_heads * self.head_k_dim, num_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.g_proj = nn.Linear(hidden_size, values, bias=False)
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        keys, values = (self.num_heads, self.head_k_dim), (self.num_heads, self.head_v_dim)
        retention = ops.fused_recurrent_retention if self._recurrent(x.shape[1]) else ops.chunk_retention
        o, recurrent = retention(
            apply_rotary(self.q_proj(x).unflatten(-1, keys), sequences.positions, self.rope_theta),
            apply_rotary(self.k_proj(x).unflatten(-1, keys), sequences.positions, self.rope_theta),
            self.v_proj(x).unflatten(-1, values),
            initial_state=state.get("recurrent_state"),
            output_final_state=keep_state,
            cu_seqlens=sequences.cu_seqlens,
        )
        y = self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, values)).flatten(-2))
        return y, {} if recurrent is None else {"recurrent_state": recurrent}

    def flops_per_token(self, context_length: int) -> float:
        """5 K V a head: decay the state, write and read it."""
        del context_length
        return 5.0 * self.num_heads * self.head_k_dim * self.head_v_dim

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        return {"recurrent_state": self.num_heads * self.head_k_dim * self.head_v_dim}
