# SPDX-License-Identifier: Apache-2.0
"""The Gated DeltaNet layer (Yang, Kautz and Hatamizadeh, arXiv 2412.06464)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright import ops
from tilewright.nn.mixer import MAX_KEY_SIZE, Mixer, MixerMode, Sequences, convolve, heads_of
from tilewright.nn.norms import GatedRMSNorm, RMSNorm, wide
from tilewright.nn.short_convolution import ShortConvolution, conv_elements

DT_RANGE = (1e-3, 1e-1)
A_RANGE = (1e-4, 16.0)
"""Mamba-2's ranges; A's lower end is 0 there, here just above, so that its logarithm is finite."""


class GatedDeltaNet(Mixer):
    """``S <- alpha S + beta k (v - alpha S^T k)^T``, ``o = S^T q / sqrt(K)`` (eq. 10 and figure 1).

    As DeltaNet, with a decay ``alpha = exp(-exp(A_log) softplus(W_a x + dt_bias))`` for each value head and the
    output gate ``SiLU(W_g x)``. The layer published with the paper has D = 2048, H = 6, head_dim = 256.

    Args:
        hidden_size: D.
        num_heads: H, of queries and keys.
        head_dim: K; D / H when None.
        num_v_heads: HV, a multiple of H; H when None.
        expand_v: V / K.
        use_short_conv, conv_size: the convolution and its width; without it SiLU alone is applied.
        use_gate: the output gate.
        allow_neg_eigval: beta in (0, 2), so that a state can be reflected.
        norm_eps: of the output norm.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads, or a head's keys are wider than 256.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 6,
        *,
        head_dim: int | None = None,
        num_v_heads: int | None = None,
        expand_v: float = 2.0,
        use_short_conv: bool = True,
        conv_size: int = 4,
        use_gate: bool = True,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        keys = hidden_size if head_dim is None else num_heads * head_dim
        self.head_k_dim = heads_of("GatedDeltaNet", "width of the keys", keys, num_heads, MAX_KEY_SIZE)
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        if self.num_v_heads < 1 or self.num_v_heads % num_heads:
            raise ValueError(f"GatedDeltaNet: num_v_heads = {num_v_heads} is not a multiple of num_heads = {num_heads}")
        self.head_v_dim = heads_of("GatedDeltaNet", "expand_v * head_dim", expand_v * self.head_k_dim, 1)
        self.beta_factor = 2.0 if allow_neg_eigval else 1.0
        values = self.num_v_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads))
        self.conv = ShortConvolution(2 * keys + values, conv_size) if use_short_conv else None
        self.g_proj = nn.Linear(hidden_size, values, bias=False) if use_gate else None
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps) if use_gate else RMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The decay's own parameters: see :func:`reset_decay`."""
        reset_decay(self.A_log, self.dt_bias, generator)

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        streams = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        (q, k, v), new = convolve(self.conv, streams, F.silu, state, sequences)
        rule = ops.fused_recurrent_gated_delta_rule if self._recurrent(x.shape[1]) else ops.chunk_gated_delta_rule
        o, recurrent = rule(
            q.unflatten(-1, (self.num_heads, self.head_k_dim)),
            k.unflatten(-1, (self.num_heads, self.head_k_dim)),
            v.unflatten(-1, (self.num_v_heads, self.head_v_dim)),
            wide(self.a_proj(x)),
            self.beta_factor * torch.sigmoid(self.b_proj(x)),
            initial_state=state.get("recurrent_state"),
            output_final_state=keep_state,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            cu_seqlens=sequences.cu_seqlens,
        )
        if self.g_proj is None:
            o = self.o_norm(o)
        else:
            o = self.o_norm(o, self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim)))
        y = self.o_proj(o.flatten(-2))
        return y, new if recurrent is None else {**new, "recurrent_state": recurrent}

    def flops_per_token(self, context_length: int) -> float:
        """7 K V a value head: decay the state, read, write and read it."""
        del context_length
        return 7.0 * self.num_v_heads * self.head_k_dim * self.head_v_dim

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        return {"recurrent_state": self.num_v_heads * self.head_k_dim * self.head_v_dim} | conv_elements(self.conv)


def reset_decay(A_log: nn.Parameter, dt_bias: nn.Parameter, generator: torch.Generator | None) -> None:
    """A uniform in (0, 16], dt log-uniform in [1e-3, 1e-1] through the inverse of softplus (Mamba-2); no weight decay.

    The attribute ``_no_weight_decay`` on both tells an optimizer's builder to leave them alone.
    """
    nn.init.uniform_(A_log, *A_RANGE, generator=generator)
    low, high = (math.log(dt) for dt in DT_RANGE)
    nn.init.uniform_(dt_bias, low, high, generator=generator)
    with torch.no_grad():
        for parameter, change in ((A_log, torch.log), (dt_bias, _inverse_softplus_exp)):
            parameter.copy_(change(parameter))
    A_log._no_weight_decay = dt_bias._no_weight_decay = True  # type: ignore[attr-defined]


def _inverse_softplus_exp(log_dt: Tensor) -> Tensor:
    """b with softplus(b) = exp(log_dt)."""
    dt = log_dt.exp()
    return dt + torch.log(-torch.expm1(-dt))
