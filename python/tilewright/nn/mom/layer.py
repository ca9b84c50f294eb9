# SPDX-License-Identifier: Apache-2.0
"""The token mixer with several memories and a router (MoM, arXiv 2502.13685)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.nn.cache import MixerCache
from tilewright.nn.delta_rule.gated_delta_net import reset_decay
from tilewright.nn.mixer import MAX_KEY_SIZE, Mixer, MixerMode, Sequences, current_columns, heads_of, packing
from tilewright.nn.mom.attention import OPS, USES_BETA, Op
from tilewright.nn.mom.dispatch import Dispatch
from tilewright.nn.mom.grouped import GroupedLinear
from tilewright.nn.mom.routing import mom_route
from tilewright.nn.mom.state import Memories
from tilewright.nn.norms import GatedRMSNorm, wide
from tilewright.nn.short_convolution import ShortConvolution, conv_elements

GLA_RANK = 16
GLA_NORMALIZER = 16.0
"""Rank of the decay's projection and divisor of its logarithm, as in the GLA layer (arXiv 2312.06635, section 4.4)."""


class MomAttention(Mixer):
    """Mixture of memories: each token writes to and reads from k of M states, and one that all share (section 3).

    A router picks k memories of every token (:func:`mom_route`). Each memory has its own key, value and gate
    projections and sees only its own tokens, its short convolution included. The reads are summed with the router's
    weights, that of the shared memory with weight 1; then come a gated RMS norm a head and the output projection. The
    query projection, the convolution's weights, A_log and dt_bias are common to all memories.

    States: `recurrent_state` `[B, M (+ 1), H, K, V]` and `conv_state` `[B, M (+ 1), C, W - 1]`, the shared memory last.

    Args:
        hidden_size: D.
        head_dim: K; D / H when None.
        num_heads: H.
        expand_v: V / K.
        num_memories: M, the routed ones.
        topk: k.
        shared_mem: one more memory that every token writes to and reads from.
        single_kv_proj: all memories use the same key, value and gate projections.
        use_short_conv, conv_size: the convolution of q, k and v and its width; without it SiLU alone is applied.
        backend: the recurrence of a memory: "gated_delta_rule", "delta_rule", "gla" or "linear".
        norm_eps: of the output norm.
        layer_idx, mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads, a head's keys are wider than 256, topk is not in 1..M, or
            backend is another word.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        head_dim: int | None = None,
        num_heads: int = 4,
        expand_v: float = 1.0,
        num_memories: int = 4,
        topk: int = 2,
        shared_mem: bool = True,
        single_kv_proj: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        mode: MixerMode = "auto",
        layer_idx: int = 0,
        *,
        backend: Op = "gated_delta_rule",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        keys = hidden_size if head_dim is None else num_heads * head_dim
        self.head_k_dim = heads_of("MomAttention", "width of the keys", keys, num_heads, MAX_KEY_SIZE)
        self.head_v_dim = heads_of("MomAttention", "expand_v * head_dim", expand_v * self.head_k_dim, 1)
        _check(num_memories, topk, backend)
        self.num_memories, self.topk, self.shared_mem = num_memories, topk, shared_mem
        self.single_kv_proj, self.backend = single_kv_proj, backend
        self._collected: list[Tensor] | None = None
        values = num_heads * self.head_v_dim
        self.router = nn.Linear(hidden_size, num_memories, bias=False)
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = self._per_memory(hidden_size, keys)
        self.v_proj = self._per_memory(hidden_size, values)
        if backend in USES_BETA:
            self.b_proj = self._per_memory(hidden_size, num_heads)
        if backend == "gated_delta_rule":
            self.a_proj = self._per_memory(hidden_size, num_heads)
            self.A_log, self.dt_bias = nn.Parameter(torch.empty(num_heads)), nn.Parameter(torch.empty(num_heads))
        elif backend == "gla":
            self.gk_down_proj = self._per_memory(hidden_size, GLA_RANK)
            self.gk_up_proj = self._per_memory(GLA_RANK, keys, bias=True)
        self.conv = ShortConvolution(2 * keys + values, conv_size) if use_short_conv else None
        self.g_proj = nn.Linear(hidden_size, values, bias=False)
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def _per_memory(self, inputs: int, outputs: int, *, bias: bool = False) -> nn.Module:
        if self.single_kv_proj:
            return nn.Linear(inputs, outputs, bias=bias)
        return GroupedLinear(self.states_per_sequence, inputs, outputs, bias=bias)

    @property
    def states_per_sequence(self) -> int:
        """Memories of a sequence, the shared one included."""
        return self.num_memories + self.shared_mem

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The decay's own parameters, as in Gated DeltaNet."""
        if self.backend == "gated_delta_rule":
            reset_decay(self.A_log, self.dt_bias, generator)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        output_router_logits: bool = False,
        router_logits: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, MixerCache | None] | tuple[Tensor, None, MixerCache | None, Tensor]:
        """Mix tokens: see :meth:`tilewright.nn.mixer.Mixer.forward`.

        Args:
            output_router_logits: return the router's logits `[B, T, M]` as a fourth value, 0 at padding.
            router_logits: a list to which the logits `[..., M]` of the tokens that count are appended.

        Raises:
            ValueError: see :meth:`tilewright.nn.mixer.Mixer.forward` and :func:`mom_route`.
        """
        if output_router_logits and router_logits is None:
            router_logits = []
        self._collected = router_logits
        try:
            mixed = super().forward(
                hidden_states, attention_mask, past_key_values, use_cache, cu_seqlens, position_ids, **kwargs
            )
        finally:
            self._collected = None
        if not output_router_logits or router_logits is None:
            return mixed
        logits = router_logits[-1]
        keep = current_columns(attention_mask, hidden_states.shape[1])
        if keep is not None:
            places = logits.new_zeros(keep.numel(), self.num_memories)
            logits = places.index_copy(0, packing(keep)[0], logits[0]).unflatten(0, keep.shape)
        return (*mixed, logits)

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights, indices, logits = mom_route(x, self.topk, weight=self.router.weight)
        if self._collected is not None:
            self._collected.append(logits)
        if self.shared_mem:
            weights = F.pad(weights, (0, 1), value=1.0)
            indices = F.pad(indices, (0, 1), value=self.num_memories)
        dispatch = Dispatch.of(indices, self.states_per_sequence, sequences.cu_seqlens)
        memories = Memories(self, dispatch, state, keep_state=keep_state, tokens=x.shape[1])
        *streams, gates, beta = self._project(x.flatten(0, 1), dispatch)
        q, k, v = memories.convolve(*streams)
        o = dispatch.combine(memories.recur(q, k, v, gates, beta), weights.flatten(0, 1))
        o = self.o_norm(o, self.g_proj(x).view_as(o)) if o.numel() else o
        return self.o_proj(o.flatten(-2).view(*x.shape[:2], -1)), memories.new

    def _project(self, x: Tensor, dispatch: Dispatch) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """q, k, v, the logits (or, for "gla", logarithms) of the decay, and beta, of all rows."""
        rows = None if self.single_kv_proj else dispatch.gather(x)

        def project(*modules: nn.Module) -> Tensor:
            y = x if rows is None else rows
            for module in modules:
                y = module(y) if rows is None else module(y, dispatch.sizes)
            return dispatch.gather(y) if rows is None else y

        q, k, v = dispatch.gather(self.q_proj(x)), project(self.k_proj), project(self.v_proj)
        beta = torch.sigmoid(project(self.b_proj)) if self.backend in USES_BETA else None
        gates = None
        if self.backend == "gated_delta_rule":
            gates = wide(project(self.a_proj))
        elif self.backend == "gla":
            logits = wide(project(self.gk_down_proj, self.gk_up_proj))
            gates = (F.logsigmoid(logits) / GLA_NORMALIZER).unflatten(-1, (self.num_heads, self.head_k_dim))
        return q, k, v, gates, beta

    def recurrence_flops(self) -> float:
        """Of every memory that a token uses, as in the layer of that recurrence: 4 to 7 K V a head."""
        each = {"gated_delta_rule": 7.0, "delta_rule": 6.0, "gla": 5.0, "linear": 4.0}[self.backend]
        return (self.topk + self.shared_mem) * each * self.num_heads * self.head_k_dim * self.head_v_dim

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        one = {"recurrent_state": self.num_heads * self.head_k_dim * self.head_v_dim} | conv_elements(self.conv)
        return {name: self.states_per_sequence * count for name, count in one.items()}

    def extra_repr(self) -> str:
        return (
            f"num_memories={self.num_memories}, topk={self.topk}, shared_mem={self.shared_mem}, "
            f"single_kv_proj={self.single_kv_proj}, backend={self.backend!r}, num_heads={self.num_heads}, "
            f"head_k_dim={self.head_k_dim}, head_v_dim={self.head_v_dim}"
        )


def _check(num_memories: int, topk: int, backend: str) -> None:
    if not 1 <= topk <= num_memories:
        raise ValueError(
            f"MomAttention: topk = {topk}, num_memories = {num_memories}; needed 1 <= topk <= num_memories"
        )
    if backend not in OPS:
        raise ValueError(f"MomAttention: backend = {backend!r}, needed one of {', '.join(OPS)}")
    if topk == 1 and num_memories > 1:
        warnings.warn(
            "MomAttention: with topk = 1 the read-out weight is always 1, so the router learns from the "
            "load-balancing loss alone",
            stacklevel=3,
        )
