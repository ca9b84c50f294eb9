# SPDX-License-Identifier: Apache-2.0
"""The HGRN layer (Qin, Yang and Zhong, arXiv 2311.04823), in real numbers as its successors have it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright import ops
from tilewright.nn.hgrn.gate import log_forget_gate
from tilewright.nn.mixer import Mixer, MixerMode, Sequences, convolve, heads_of
from tilewright.nn.norms import GatedRMSNorm, wide
from tilewright.nn.short_convolution import ShortConvolution, conv_elements


class HGRN(Mixer):
    """``h <- a o h + (1 - a) o SiLU(W_i x)``, ``y = W_o (norm(h) o SiLU(W_g x))`` (eqs. 1 to 4).

    ``a = lb + (1 - lb) sigmoid(W_f x)`` with a lower bound lb that the model learns and that grows with depth
    (:mod:`tilewright.nn.hgrn.gate`). The state is a vector; one norm spans it.

    Args:
        hidden_size: D.
        num_heads: accepted for the common signature; the recurrence has no heads.
        expand_ratio: width of the state over D.
        use_short_conv, conv_size: a causal convolution on i and f; the paper has none.
        norm_eps: of the output norm.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: expand_ratio * hidden_size is no whole number.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 1,
        *,
        expand_ratio: float = 1.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        self.state_size = heads_of("HGRN", "expand_ratio * hidden_size", expand_ratio * hidden_size, 1)
        self.lower_bound_size = self.state_size
        self.i_proj = nn.Linear(hidden_size, self.state_size, bias=False)
        self.f_proj = nn.Linear(hidden_size, self.state_size, bias=False)
        self.g_proj = nn.Linear(hidden_size, self.state_size, bias=False)
        self.conv = ShortConvolution(2 * self.state_size, conv_size, activation=None) if use_short_conv else None
        self.o_norm = GatedRMSNorm(self.state_size, norm_eps)
        self.o_proj = nn.Linear(self.state_size, hidden_size, bias=False)

    def mix(
        self,
        x: Tensor,
        state: Mapping[str, Tensor],
        sequences: Sequences,
        *,
        keep_state: bool,
        lower_bound: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        streams = (self.i_proj(x), self.f_proj(x))
        (i, f), new = convolve(self.conv, streams, lambda y: y, state, sequences)
        log_a = log_forget_gate(f, lower_bound)
        scan = ops.fused_recurrent_hgrn if self._recurrent(x.shape[1]) else ops.chunk_hgrn
        h, recurrent = scan(
            F.silu(wide(i)) * -torch.expm1(log_a),
            log_a,
            initial_state=state.get("recurrent_state"),
            output_final_state=keep_state,
            cu_seqlens=sequences.cu_seqlens,
        )
        y = self.o_proj(self.o_norm(h.to(x.dtype), self.g_proj(x)))
        return y, new if recurrent is None else {**new, "recurrent_state": recurrent}

    def flops_per_token(self, context_length: int) -> float:
        """5 a channel: 1 - a, its product with the input, decay, and sum, and the read-out's product."""
        del context_length
        return 5.0 * self.state_size

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        return {"recurrent_state": self.state_size} | conv_elements(self.conv)
