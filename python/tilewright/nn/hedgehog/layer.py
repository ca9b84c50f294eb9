# SPDX-License-Identifier: Apache-2.0
"""The Hedgehog layer, trained from scratch (Zhang et al., arXiv 2402.04347, section 5.1)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tilewright.nn.hedgehog.attention import hedgehog_attention
from tilewright.nn.hedgehog.feature_maps import Activation, HedgehogFeatureMap
from tilewright.nn.mixer import MAX_KEY_SIZE, Mixer, MixerMode, Sequences, convolve, heads_of
from tilewright.nn.rotary import apply_rotary
from tilewright.nn.short_convolution import ShortConvolution, conv_elements


class HedgehogLinearAttention(Mixer):
    """``S <- S + phi_k(k) v^T``, ``z <- z + phi_k(k)``, ``o = S^T phi_q(q) / (z . phi_q(q))``, both maps learned.

    Args:
        hidden_size: D.
        num_heads: H.
        feature_dim: rows of a map, D / H unless given; a head's features are twice as many, at most 256.
        activation, bias: of the maps (:class:`tilewright.nn.hedgehog.HedgehogFeatureMap`), which start as the identity.
        rope_theta: base of a rotary embedding of q and k before the maps; None: no positions, as in the linear mixers.
            Features of rotated vectors depend on the positions themselves, not on their differences alone, so
            left-padded rows need ``position_ids`` that count from their first token.
        use_short_conv, conv_size: a causal convolution and SiLU on q, k and v; the paper has none.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads, features are above 256, heads of odd size with rotary
            embedding, or the activation is another word.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 8,
        *,
        feature_dim: int | None = None,
        activation: Activation = "softmax_dim",
        bias: bool = False,
        rope_theta: float | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        layer_idx: int = 0,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        name = "HedgehogLinearAttention"
        self.head_dim = heads_of(name, "hidden_size", hidden_size, num_heads)
        self.feature_size = 2 * (self.head_dim if feature_dim is None else feature_dim)
        heads_of(name, "width of the features", self.feature_size * num_heads, num_heads, MAX_KEY_SIZE)
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"{name}: head size {self.head_dim} with rope_theta; an even number is needed")
        self.rope_theta = rope_theta
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        self.conv = ShortConvolution(3 * hidden_size, conv_size) if use_short_conv else None
        self.phi_q = HedgehogFeatureMap(self.head_dim, feature_dim, num_heads, activation, bias)
        self.phi_k = HedgehogFeatureMap(self.head_dim, feature_dim, num_heads, activation, bias)

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        streams = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        mixed, new = convolve(self.conv, streams, lambda y: y, state, sequences)
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in mixed)
        if self.rope_theta is not None:
            q, k = (apply_rotary(y, sequences.positions, self.rope_theta) for y in (q, k))
        o, recurrent = hedgehog_attention(
            q,
            k,
            v,
            phi_q=self.phi_q,
            phi_k=self.phi_k,
            initial_state=state.get("recurrent_state"),
            output_final_state=keep_state,
            cu_seqlens=sequences.cu_seqlens,
            mode="recurrent" if self._recurrent(x.shape[1]) else "chunk",
        )
        return self.o_proj(o.flatten(-2)), new if recurrent is None else {**new, "recurrent_state": recurrent}

    def flops_per_token(self, context_length: int) -> float:
        """A head: 2 D F for the two maps, and 4 F (V + 1) to write and read the state with the sum of the keys."""
        del context_length
        maps = 2.0 * self.head_dim * self.feature_size
        return self.num_heads * (maps + 4.0 * self.feature_size * (self.head_dim + 1))

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        size = self.num_heads * self.feature_size * (self.head_dim + 1)
        return {"recurrent_state": size} | conv_elements(self.conv)
