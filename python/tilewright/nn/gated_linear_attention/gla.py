# SPDX-License-Identifier: Apache-2.0
"""The gated linear attention layer (Yang et al., arXiv 2312.06635)."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from tilewright import ops
from tilewright.nn.mixer import MAX_KEY_SIZE, Mixer, MixerMode, Sequences, convolve, heads_of
from tilewright.nn.norms import GatedRMSNorm, wide
from tilewright.nn.short_convolution import ShortConvolution, conv_elements


class GatedLinearAttention(Mixer):
    """``S <- diag(alpha) S + k v^T``, ``o = S^T q / sqrt(K)`` (eq. 3 and section 4.4).

    ``alpha = sigmoid(W_2 W_1 x + b)^(1/16)`` through a map of low rank; each head's output is normalised and gated
    by ``SiLU(W_g x)``.

    Args:
        hidden_size: D.
        num_heads: H.
        expand_k, expand_v: width of all keys and of all values over D.
        gate_rank: of the decay's map.
        gate_logit_normalizer: the 16 above; the larger, the slower the forgetting at the start of training.
        use_short_conv, conv_size: a causal convolution and SiLU on q, k and v; the paper has neither.
        norm_eps: of the norm per head.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads, or a head's keys are wider than 256.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 4,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_logit_normalizer: float = 16.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        name = "GatedLinearAttention"
        self.head_k_dim = heads_of(name, "expand_k * hidden_size", expand_k * hidden_size, num_heads, MAX_KEY_SIZE)
        self.head_v_dim = heads_of(name, "expand_v * hidden_size", expand_v * hidden_size, num_heads)
        if gate_rank < 1 or not gate_logit_normalizer > 0:
            raise ValueError(
                f"{name}: gate_rank = {gate_rank}, gate_logit_normalizer = {gate_logit_normalizer}; "
                "needed positive numbers"
            )
        self.gate_logit_normalizer = gate_logit_normalizer
        keys, values = num_heads * self.head_k_dim, num_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(hidden_size, gate_rank, bias=False), nn.Linear(gate_rank, keys))
        self.g_proj = nn.Linear(hidden_size, values, bias=False)
        self.conv = ShortConvolution(2 * keys + values, conv_size) if use_short_conv else None
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        keys, values = (self.num_heads, self.head_k_dim), (self.num_heads, self.head_v_dim)
        streams = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        (q, k, v), new = convolve(self.conv, streams, lambda y: y, state, sequences)
        decay = F.logsigmoid(wide(self.gk_proj(x))) / self.gate_logit_normalizer
        attend = ops.fused_recurrent_gla if self._recurrent(x.shape[1]) else ops.chunk_gla
        o, recurrent = attend(
            q.unflatten(-1, keys),
            k.unflatten(-1, keys),
            v.unflatten(-1, values),
            decay.unflatten(-1, keys),
            initial_state=state.get("recurrent_state"),
            output_final_state=keep_state,
            cu_seqlens=sequences.cu_seqlens,
        )
        y = self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, values)).flatten(-2))
        return y, new if recurrent is None else {**new, "recurrent_state": recurrent}

    def flops_per_token(self, context_length: int) -> float:
        """5 K V a head: decay the state, write and read it."""
        del context_length
        return 5.0 * self.num_heads * self.head_k_dim * self.head_v_dim

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        return {"recurrent_state": self.num_heads * self.head_k_dim * self.head_v_dim} | conv_elements(self.conv)
