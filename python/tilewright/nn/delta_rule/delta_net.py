# SPDX-License-Identifier: Apache-2.0
"""The DeltaNet layer (Yang et al., arXiv 2406.06484)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright import ops
from tilewright.nn.mixer import MAX_KEY_SIZE, Mixer, MixerMode, Sequences, convolve, heads_of
from tilewright.nn.norms import GatedRMSNorm, RMSNorm
from tilewright.nn.short_convolution import ShortConvolution, conv_elements


class DeltaNet(Mixer):
    """``S <- S + beta k (v - S^T k)^T``, ``o = S^T q / sqrt(K)``, one matrix state a head (eq. 4, section 3.4).

    q, k, v are linear maps of the token, then a causal convolution, SiLU, and for q and k unit length;
    ``beta = sigmoid(W_b x)``; each head's output is normalised, and all are projected back.

    Args:
        hidden_size: D.
        num_heads: H.
        expand_k, expand_v: width of all keys and of all values over D.
        use_short_conv, conv_size: the convolution and its width; without it SiLU alone is applied.
        use_gate: multiply the normalised output by ``SiLU(W_g x)``; the paper has no gate.
        allow_neg_eigval: beta in (0, 2), so that a state can be reflected.
        norm_eps: of the output norm.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads, or a head's keys are wider than 256.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 4,
        *,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        use_short_conv: bool = True,
        conv_size: int = 4,
        use_gate: bool = False,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        self.head_k_dim = heads_of(
            "DeltaNet", "expand_k * hidden_size", expand_k * hidden_size, num_heads, MAX_KEY_SIZE
        )
        self.head_v_dim = heads_of("DeltaNet", "expand_v * hidden_size", expand_v * hidden_size, num_heads)
        self.beta_factor = 2.0 if allow_neg_eigval else 1.0
        keys, values = num_heads * self.head_k_dim, num_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.conv = ShortConvolution(2 * keys + values, conv_size) if use_short_conv else None
        self.g_proj = nn.Linear(hidden_size, values, bias=False) if use_gate else None
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps) if use_gate else RMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        streams = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        (q, k, v), new = convolve(self.conv, streams, F.silu, state, sequences)
        rule = ops.fused_recurrent_delta_rule if self._recurrent(x.shape[1]) else ops.chunk_delta_rule
        o, recurrent = rule(
            q.unflatten(-1, (self.num_heads, self.head_k_dim)),
            k.unflatten(-1, (self.num_heads, self.head_k_dim)),
            v.unflatten(-1, (self.num_heads, self.head_v_dim)),
            self.beta_factor * torch.sigmoid(self.b_proj(x)),
            initial_state=state.get("recurrent_state"),
            output_final_state=keep_state,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=sequences.cu_seqlens,
        )
        if self.g_proj is None:
            o = self.o_norm(o)
        else:
            o = self.o_norm(o, self.g_proj(x).unflatten(-1, (self.num_heads, self.head_v_dim)))
        y = self.o_proj(o.flatten(-2))
        return y, new if recurrent is None else {**new, "recurrent_state": recurrent}

    def flops_per_token(self, context_length: int) -> float:
        """6 K V a head: read, write and read the state, a multiply and an add each."""
        del context_length
        return 6.0 * self.num_heads * self.head_k_dim * self.head_v_dim

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        return {"recurrent_state": self.num_heads * self.head_k_dim * self.head_v_dim} | conv_elements(self.conv)
