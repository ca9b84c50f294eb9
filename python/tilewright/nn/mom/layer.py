# SPDX-License-Identifier: Apache-2.0
"""The token mixer with several memories and a router (MoM, arXiv 2502.13685)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewright.nn.cache import MixerCache
from tilewright.nn.mom.attention import OPS, USES_BETA, Mode, Op
from tilewright.nn.mom.dispatch import Dispatch
from tilewright.nn.mom.grouped import XAVIER_GAIN, GroupedLinear
from tilewright.nn.mom.routing import NOWHERE, mom_route
from tilewright.nn.mom.state import Memory
from tilewright.nn.norms import GatedRMSNorm
from tilewright.nn.short_convolution import ShortConvolution
from tilewright.ops.delta_rule import gate_logarithm

GLA_RANK = 16
GLA_NORMALIZER = 16.0


class MomAttention(nn.Module):
    """Mixture of memories: a linear-time mixer whose tokens each write to and read from k of M states.

    A router picks k memories of every token (:func:`mom_route`); each memory has its own key, value and gate
    projections and sees only its own tokens, its short convolution included; the reads are summed with the router's
    weights, an always-on memory's is added with weight 1, then come a gated RMS norm a head and the output projection
    (arXiv 2502.13685, section 3). The query projection, the convolutions' weights, A_log and dt_bias are shared by
    all memories. State: `[B, M (+ 1), H, K, V]`, whatever the length.

    Args:
        hidden_size: D. head_dim: K. num_heads: H. expand_v: V / K.
        num_memories: M, routed ones. topk: k.
        shared_mem: one more memory that every token writes to and reads from.
        single_kv_proj: all memories share key, value and gate projections.
        use_short_conv, conv_size: causal depthwise convolution with SiLU on q, k and v, and its width.
        mode: "chunk", or "recurrent" for token by token.
        layer_idx: the layer's place in a :class:`MixerCache`.
        backend: the recurrence of a memory: "gated_delta_rule", "delta_rule", "gla" or "linear".
        norm_eps: of the output norm.

    Raises:
        ValueError: a size is not positive, `expand_v * head_dim` is no integer, topk exceeds M, or backend or mode is
            another word.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        head_dim: int = 256,
        num_heads: int = 4,
        expand_v: float = 2.0,
        num_memories: int = 4,
        topk: int = 2,
        shared_mem: bool = True,
        single_kv_proj: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        mode: Mode = "chunk",
        layer_idx: int | None = None,
        *,
        backend: Op = "gated_delta_rule",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        value_dim = int(head_dim * expand_v)
        _check(hidden_size, head_dim, num_heads, expand_v, num_memories, topk, backend, mode)
        if topk == 1 and num_memories > 1:
            warnings.warn(
                "MomAttention: with topk = 1 the read-out weight is always 1, so the router learns from the "
                "load-balancing loss alone",
                stacklevel=2,
            )
        self.hidden_size, self.head_dim, self.num_heads, self.value_dim = hidden_size, head_dim, num_heads, value_dim
        self.num_memories, self.topk, self.shared_mem = num_memories, topk, shared_mem
        self.single_kv_proj, self.mode, self.layer_idx, self.backend = single_kv_proj, mode, layer_idx, backend
        keys, values = num_heads * head_dim, num_heads * value_dim
        self.router = nn.Linear(hidden_size, num_memories, bias=False)
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = self._per_memory(hidden_size, keys)
        self.v_proj = self._per_memory(hidden_size, values)
        if backend in USES_BETA:
            self.b_proj = self._per_memory(hidden_size, num_heads)
        if backend == "gated_delta_rule":
            self.a_proj = self._per_memory(hidden_size, num_heads)
            self.A_log, self.dt_bias = nn.Parameter(torch.empty(num_heads)), nn.Parameter(torch.empty(num_heads))
        if backend == "gla":
            self.gk_down_proj = self._per_memory(hidden_size, GLA_RANK)
            self.gk_up_proj = self._per_memory(GLA_RANK, keys, bias=True)
        self.use_short_conv = use_short_conv
        if use_short_conv:
            self.q_conv1d = ShortConvolution(keys, conv_size)
            self.k_conv1d = ShortConvolution(keys, conv_size)
            self.v_conv1d = ShortConvolution(values, conv_size)
        self.g_proj = nn.Linear(hidden_size, values, bias=False)
        self.o_norm = GatedRMSNorm(value_dim, norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Linear weights Xavier uniform with gain 2^-2.5; gates and convolutions as in Gated DeltaNet."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=XAVIER_GAIN, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (GroupedLinear, ShortConvolution)):
                module.reset_parameters(generator)
        if self.backend == "gated_delta_rule":
            reset_gate(self.A_log, self.dt_bias, generator)

    @property
    def states_per_sequence(self) -> int:
        """Memories of a sequence, the shared one included."""
        return self.num_memories + self.shared_mem

    def _per_memory(self, inputs: int, outputs: int, *, bias: bool = False) -> nn.Module:
        if self.single_kv_proj:
            return nn.Linear(inputs, outputs, bias=bias)
        return GroupedLinear(self.states_per_sequence, inputs, outputs, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, MixerCache | None] | tuple[Tensor, None, MixerCache | None, Tensor]:
        """Mix tokens.

        Args:
            hidden_states: `[B, T, D]`.
            attention_mask: `[B, T]` or longer to the left, 0 for padding: it routes nowhere and gives 0.
            past_key_values: states to go on from; written to with use_cache.
            cu_seqlens: `[N + 1]` with B = 1: offsets of packed sequences.
            output_router_logits: return the router's logits too.

        Returns:
            `[B, T, D]`, None, the cache; and the logits `[B, T, M]` if asked for.

        Raises:
            ValueError: see :func:`mom_route` and :func:`mom_attention`; or a cache without a layer_idx.
        """
        del position_ids, kwargs
        batch, length, _ = hidden_states.shape
        mask = None if attention_mask is None else attention_mask[:, -length:]
        x = hidden_states if mask is None else hidden_states.masked_fill((mask == 0)[..., None], 0.0)
        weights, indices, logits = mom_route(x, self.topk, weight=self.router.weight, attention_mask=mask)
        if self.shared_mem:
            always = weights.new_ones(batch, length, 1)
            place = indices.new_full((batch, length, 1), self.num_memories)
            if mask is not None:
                place = place.masked_fill((mask == 0)[..., None], NOWHERE)
            weights, indices = torch.cat([weights, always], -1), torch.cat([indices, place], -1)
        dispatch = Dispatch.of(indices, self.states_per_sequence, cu_seqlens)
        rows = self._mix(x.flatten(0, 1), dispatch, length, past_key_values, use_cache)
        o = dispatch.combine(rows, weights.flatten(0, 1))
        o = self.o_norm(o, self.g_proj(x).view(-1, self.num_heads, self.value_dim))
        out = self.o_proj(o.flatten(1).view(batch, length, -1))
        return (out, None, past_key_values, logits) if output_router_logits else (out, None, past_key_values)

    def _mix(
        self, x: Tensor, dispatch: Dispatch, length: int, cache: MixerCache | None, use_cache: bool
    ) -> Tensor:
        """The reads of all rows, `[R, H, V]`; x `[tokens, D]`."""
        memory = Memory(self, dispatch, length, cache, write=use_cache)
        *inputs, g, beta = self._project(x, dispatch)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in memory.convolve(*inputs))
        rows = memory.recur(q, k, v, g, beta)
        memory.store()
        return rows

    def _project(self, x: Tensor, dispatch: Dispatch) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        q = dispatch.gather(self.q_proj(x))
        rows = None if self.single_kv_proj else dispatch.gather(x)

        def project(*modules: nn.Module) -> Tensor:
            y = x if rows is None else rows
            for module in modules:
                y = module(y) if rows is None else module(y, dispatch.sizes)
            return dispatch.gather(y) if rows is None else y

        k, v = project(self.k_proj), project(self.v_proj)
        beta = g = None
        if self.backend in USES_BETA:
            b = project(self.b_proj)
            beta = torch.sigmoid(b if b.dtype == torch.float64 else b.float())
        if self.backend == "gated_delta_rule":
            g = gate_logarithm(project(self.a_proj)[None], self.A_log, self.dt_bias)[0]
        elif self.backend == "gla":
            logits = project(self.gk_down_proj, self.gk_up_proj)
            g = F.logsigmoid(logits if logits.dtype == torch.float64 else logits.float()) / GLA_NORMALIZER
            g = g.unflatten(-1, (self.num_heads, -1))
        return q, k, v, g, beta

    def extra_repr(self) -> str:
        return (
            f"num_memories={self.num_memories}, topk={self.topk}, shared_mem={self.shared_mem}, "
            f"single_kv_proj={self.single_kv_proj}, backend={self.backend!r}, num_heads={self.num_heads}, "
            f"head_dim={self.head_dim}, value_dim={self.value_dim}"
        )


def reset_gate(A_log: Tensor, dt_bias: Tensor, generator: torch.Generator | None) -> None:
    with torch.no_grad():
        A_log.uniform_(0, 16, generator=generator).log_()
        dt = torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def _check(
    hidden_size: int,
    head_dim: int,
    num_heads: int,
    expand_v: float,
    num_memories: int,
    topk: int,
    backend: str,
    mode: str,
) -> None:
    sizes = {"hidden_size": hidden_size, "head_dim": head_dim, "num_heads": num_heads, "num_memories": num_memories}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"MomAttention: {name} = {size}, needed 1 or more")
    if head_dim * expand_v < 1 or head_dim * expand_v != int(head_dim * expand_v):
        raise ValueError(
            f"MomAttention: expand_v = {expand_v} with head_dim = {head_dim}; their product, the size of a value, must "
            "be a positive integer"
        )
    if not 1 <= topk <= num_memories:
        raise ValueError(f"MomAttention: topk = {topk}, needed 1 to num_memories = {num_memories}")
    if backend not in OPS:
        raise ValueError(f"MomAttention: backend = {backend!r}, needed one of {', '.join(OPS)}")
    if mode not in ("chunk", "recurrent"):
        raise ValueError(f"MomAttention: mode = {mode!r}, needed 'chunk' or 'recurrent'")
