# SPDX-License-Identifier: Apache-2.0
"""The Kimi Delta Attention layer (Moonshot AI, Kimi Linear, arXiv 2510.26692)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright import ops
from tilewright.nn.delta_rule.gated_delta_net import reset_decay
from tilewright.nn.mixer import MAX_KEY_SIZE, Mixer, MixerMode, Sequences, convolve, heads_of
from tilewright.nn.norms import GatedRMSNorm, wide
from tilewright.nn.short_convolution import ShortConvolution, conv_elements


class KimiDeltaAttention(Mixer):
    """``S <- diag(alpha) S``, then the delta rule: a decay of its own for every channel of the keys (eq. 1).

    ``log alpha = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias)`` through a map of rank V; the output gate
    ``sigmoid(W_g2 W_g1 x)`` has rank V too. The published layer has head_dim 128 and expand_v 1.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K; D / H when None.
        expand_v: V / K.
        use_short_conv, conv_size: the convolution and its width; without it SiLU alone is applied.
        safe_gate, lower_bound: ``log alpha = lower_bound sigmoid(exp(A_log) (f + dt_bias))`` instead, with
            lower_bound in [-5, 0).
        allow_neg_eigval: beta in (0, 2).
        norm_eps: of the output norm.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads, a head's keys are wider than 256, or lower_bound does not fit.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 16,
        *,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        use_short_conv: bool = True,
        conv_size: int = 4,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        keys = hidden_size if head_dim is None else num_heads * head_dim
        self.head_k_dim = heads_of("KimiDeltaAttention", "width of the keys", keys, num_heads, MAX_KEY_SIZE)
        self.head_v_dim = heads_of("KimiDeltaAttention", "expand_v * head_dim", expand_v * self.head_k_dim, 1)
        if safe_gate != (lower_bound is not None) or (lower_bound is not None and not -5 <= lower_bound < 0):
            raise ValueError(
                f"KimiDeltaAttention: safe_gate = {safe_gate} with lower_bound = {lower_bound}; "
                "needed safe_gate with a bound in [-5, 0), or neither"
            )
        self.safe_gate, self.gate_bound = safe_gate, lower_bound
        self.beta_factor = 2.0 if allow_neg_eigval else 1.0
        values, rank = num_heads * self.head_v_dim, self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.f_proj = nn.Sequential(nn.Linear(hidden_size, rank, bias=False), nn.Linear(rank, keys, bias=False))
        self.g_proj = nn.Sequential(nn.Linear(hidden_size, rank, bias=False), nn.Linear(rank, values, bias=False))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(keys))
        self.conv = ShortConvolution(2 * keys + values, conv_size) if use_short_conv else None
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps, "sigmoid")
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The decay's own parameters, as in :class:`GatedDeltaNet`."""
        reset_decay(self.A_log, self.dt_bias, generator)

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        streams = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        (q, k, v), new = convolve(self.conv, streams, F.silu, state, sequences)
        keys, values = (self.num_heads, self.head_k_dim), (self.num_heads, self.head_v_dim)
        rule = ops.fused_recurrent_kda if self._recurrent(x.shape[1]) else ops.chunk_kda
        o, recurrent = rule(
            q.unflatten(-1, keys),
            k.unflatten(-1, keys),
            v.unflatten(-1, values),
            wide(self.f_proj(x)).unflatten(-1, keys),
            self.beta_factor * torch.sigmoid(self.b_proj(x)),
            initial_state=state.get("recurrent_state"),
            output_final_state=keep_state,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            safe_gate=self.safe_gate,
            lower_bound=self.gate_bound,
            cu_seqlens=sequences.cu_seqlens,
        )
        y = self.o_proj(self.o_norm(o, self.g_proj(x).unflatten(-1, values)).flatten(-2))
        return y, new if recurrent is None else {**new, "recurrent_state": recurrent}

    def flops_per_token(self, context_length: int) -> float:
        """7 K V a head: decay the state, read, write and read it."""
        del context_length
        return 7.0 * self.num_heads * self.head_k_dim * self.head_v_dim

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        return {"recurrent_state": self.num_heads * self.head_k_dim * self.head_v_dim} | conv_elements(self.conv)
