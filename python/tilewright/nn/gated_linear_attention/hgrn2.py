# SPDX-License-Identifier: Apache-2.0
"""The HGRN2 layer: HGRN with the state expanded by an outer product (Qin et al., arXiv 2404.07904)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright import ops
from tilewright.nn.hgrn.gate import log_forget_gate
from tilewright.nn.mixer import MAX_KEY_SIZE, Mixer, MixerMode, Sequences, convolve, heads_of
from tilewright.nn.norms import RMSNorm
from tilewright.nn.short_convolution import ShortConvolution, conv_elements


class HGRN2(Mixer):
    """``S <- diag(a) S + (1 - a) i^T``, ``o = S^T q / sqrt(K)`` (eq. 6): the key is one minus the forget gate.

    ``q = SiLU(W_q x)``, ``i = W_i x``, ``a = lb + (1 - lb) sigmoid(W_f x)`` with a lower bound lb that the model
    learns and that grows with depth (:mod:`tilewright.nn.hgrn.gate`). The norm is over all heads; there is no gate.

    Args:
        hidden_size: D.
        num_heads: H.
        expand_ratio: K, the forget gates of a head (128 in the paper); D / H when None.
        use_short_conv, conv_size: a causal convolution and SiLU on q, f and i; the paper has none.
        norm_eps: of the output norm.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads, or K is above 256.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 8,
        *,
        expand_ratio: int | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        keys = hidden_size if expand_ratio is None else num_heads * expand_ratio
        self.head_k_dim = heads_of("HGRN2", "width of the forget gates", keys, num_heads, MAX_KEY_SIZE)
        self.head_v_dim = heads_of("HGRN2", "hidden_size", hidden_size, num_heads)
        self.lower_bound_size = keys
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.f_proj = nn.Linear(hidden_size, keys, bias=False)
        self.i_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.conv = ShortConvolution(2 * keys + hidden_size, conv_size, activation=None) if use_short_conv else None
        self.o_norm = RMSNorm(hidden_size, norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def mix(
        self,
        x: Tensor,
        state: Mapping[str, Tensor],
        sequences: Sequences,
        *,
        keep_state: bool,
        lower_bound: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        keys, values = (self.num_heads, self.head_k_dim), (self.num_heads, self.head_v_dim)
        streams = (self.q_proj(x), self.f_proj(x), self.i_proj(x))
        (q, f, i), new = convolve(self.conv, streams, lambda y: y, state, sequences)
        log_a = log_forget_gate(f, lower_bound)
        attend = ops.fused_recurrent_gla if self._recurrent(x.shape[1]) else ops.chunk_gla
        o, recurrent = attend(
            F.silu(q).unflatten(-1, keys),
            (-torch.expm1(log_a)).to(x.dtype).unflatten(-1, keys),
            i.unflatten(-1, values),
            log_a.unflatten(-1, keys),
            initial_state=state.get("recurrent_state"),
            output_final_state=keep_state,
            cu_seqlens=sequences.cu_seqlens,
        )
        return self.o_proj(self.o_norm(o.flatten(-2))), (
            new if recurrent is None else {**new, "recurrent_state": recurrent}
        )

    def flops_per_token(self, context_length: int) -> float:
        """5 K V a head: decay the state, write and read it."""
        del context_length
        return 5.0 * self.num_heads * self.head_k_dim * self.head_v_dim

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        return {"recurrent_state": self.num_heads * self.head_k_dim * self.head_v_dim} | conv_elements(self.conv)
