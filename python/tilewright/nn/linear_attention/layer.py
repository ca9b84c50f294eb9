# SPDX-License-Identifier: Apache-2.0
"""Additive linear attention (Katharopoulos et al., arXiv 2006.16236)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tilewright import ops
from tilewright.nn.mixer import MAX_KEY_SIZE, Mixer, MixerMode, Sequences, convolve, heads_of
from tilewright.nn.norms import RMSNorm
from tilewright.nn.short_convolution import ShortConvolution, conv_elements

FEATURE_MAPS = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}


class LinearAttention(Mixer):
    """``S <- S + phi(k) v^T``, ``z <- z + phi(k)``, ``o = S^T phi(q) / (z . phi(q))`` (eqs. 10 to 12).

    Args:
        hidden_size: D.
        num_heads: H.
        expand_k, expand_v: width of all keys and of all values over D.
        feature_map: phi: "elu" (``elu(x) + 1``, the paper's), "relu" or "identity".
        normalize: divide by the sum; without it scale ``1 / sqrt(K)`` and a norm per head take its place. The
            identity has negative features, whose sum may vanish, so it is not normalised.
        use_short_conv, conv_size: a causal convolution and SiLU on q, k and v; the paper has none.
        norm_eps: of the norm per head.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads, a head's keys are wider than 256, or phi is another word.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 4,
        *,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: Literal["elu", "relu", "identity"] = "elu",
        normalize: bool | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        name = "LinearAttention"
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"{name}: feature_map = {feature_map!r}, needed one of {', '.join(FEATURE_MAPS)}")
        if normalize and feature_map == "identity":
            raise ValueError(f"{name}: normalize with feature_map = 'identity'; the sum of its features may be zero")
        self.normalize = feature_map != "identity" if normalize is None else normalize
        self.feature_map = feature_map
        self.head_k_dim = heads_of(name, "expand_k * hidden_size", expand_k * hidden_size, num_heads, MAX_KEY_SIZE)
        self.head_v_dim = heads_of(name, "expand_v * hidden_size", expand_v * hidden_size, num_heads)
        keys, values = num_heads * self.head_k_dim, num_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.conv = ShortConvolution(2 * keys + values, conv_size) if use_short_conv else None
        self.o_norm = None if self.normalize else RMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        keys, values = (self.num_heads, self.head_k_dim), (self.num_heads, self.head_v_dim)
        streams = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        (q, k, v), new = convolve(self.conv, streams, lambda y: y, state, sequences)
        phi = FEATURE_MAPS[self.feature_map]
        attend = ops.fused_recurrent_linear_attn if self._recurrent(x.shape[1]) else ops.chunk_linear_attn
        o, recurrent = attend(
            phi(q).unflatten(-1, keys),
            phi(k).unflatten(-1, keys),
            v.unflatten(-1, values),
            initial_state=state.get("recurrent_state"),
            output_final_state=keep_state,
            normalize=self.normalize,
            cu_seqlens=sequences.cu_seqlens,
        )
        o = o if self.o_norm is None else self.o_norm(o)
        y = self.o_proj(o.flatten(-2))
        return y, new if recurrent is None else {**new, "recurrent_state": recurrent}

    def flops_per_token(self, context_length: int) -> float:
        """4 K V a head: write and read the state, and the sum of the keys, which is one more column."""
        del context_length
        return 4.0 * self.num_heads * self.head_k_dim * (self.head_v_dim + self.normalize)

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        size = self.num_heads * self.head_k_dim * (self.head_v_dim + self.normalize)
        return {"recurrent_state": size} | conv_elements(self.conv)
