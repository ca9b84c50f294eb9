# SPDX-License-Identifier: Apache-2.0
"""The layer around Lightning Attention (TransNormerLLM, arXiv 2307.14995; Lightning Attention-2, 2401.04658)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright import ops
from tilewright.nn.mixer import MAX_KEY_SIZE, Mixer, MixerMode, Sequences, heads_of
from tilewright.nn.norms import RMSNorm, SimpleRMSNorm

Norm = Literal["rms", "srms", "layer"]


class LightningAttention(Mixer):
    """``S <- exp(-s) S + k v^T``, ``o = S^T q``, then ``W_o (sigmoid(W_g x) o norm(o))``; no positions.

    ``q, k, v = SiLU(W x)``; the slopes s are fixed per head and fall with depth
    (:func:`tilewright.ops.build_slope_tensor`); there is no scale, the norm over all heads takes its place.

    Args:
        hidden_size: D.
        num_heads: H.
        head_dim: K = V; D / H when None.
        layer_idx, num_layers: place of the layer, which the slopes depend on.
        norm: "rms" (MiniMax-01, arXiv 2501.08313), "srms" (TransNormer) or "layer", over the concatenated heads.
        output_gate: multiply by ``sigmoid(W_g x)``.
        gate_rank: make W_g the product of two maps of this rank; full when None.
        slopes: "alibi" (TransNormer, MiniMax) or "linear" (flash-linear-attention).
        norm_eps: of the norm.
        mode: see :class:`tilewright.nn.mixer.Mixer`.

    Raises:
        ValueError: the sizes do not divide into heads, a head is wider than 256, or an option is another word.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        layer_idx: int = 0,
        num_layers: int = 1,
        *,
        norm: Norm = "rms",
        output_gate: bool = True,
        gate_rank: int | None = None,
        slopes: Literal["alibi", "linear"] = "alibi",
        norm_eps: float = 1e-6,
        mode: MixerMode = "auto",
    ) -> None:
        super().__init__(hidden_size, num_heads, layer_idx, mode)
        if not layer_idx < num_layers:
            raise ValueError(f"LightningAttention: layer_idx = {layer_idx} with num_layers = {num_layers}")
        width = hidden_size if head_dim is None else num_heads * head_dim
        self.head_dim = heads_of("LightningAttention", "width of the keys", width, num_heads, MAX_KEY_SIZE)
        # Plain numbers: no conversion of the module rounds them, and they exist where the weights are still to come.
        with torch.device("cpu"):
            self.slopes: list[float] = ops.build_slope_tensor(num_heads, layer_idx, num_layers, slopes).tolist()
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.norm = _norm(norm, width, norm_eps)
        self.output_gate = _gate(hidden_size, width, gate_rank) if output_gate else None
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def mix(
        self, x: Tensor, state: Mapping[str, Tensor], sequences: Sequences, *, keep_state: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        heads = (self.num_heads, self.head_dim)
        q, k, v = (F.silu(w(x)).unflatten(-1, heads) for w in (self.q_proj, self.k_proj, self.v_proj))
        o, recurrent = ops.lightning_attn_func(
            q,
            k,
            v,
            torch.tensor(self.slopes, device=x.device),
            initial_state=state.get("recurrent_state"),
            output_final_state=keep_state,
            cu_seqlens=sequences.cu_seqlens,
            mode="recurrent" if self._recurrent(x.shape[1]) else "chunk",
        )
        o = self.norm(o.flatten(-2))
        if self.output_gate is not None:
            o = torch.sigmoid(self.output_gate(x)) * o
        return self.o_proj(o), {} if recurrent is None else {"recurrent_state": recurrent}

    def flops_per_token(self, context_length: int) -> float:
        """5 K V a head: decay the state, write and read it."""
        del context_length
        return 5.0 * self.num_heads * self.head_dim**2

    def state_elements(self, context_length: int) -> dict[str, int]:
        del context_length
        return {"recurrent_state": self.num_heads * self.head_dim**2}


def _norm(kind: Norm, size: int, eps: float) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(size, eps)
    if kind not in ("rms", "srms"):
        raise ValueError(f"LightningAttention: norm = {kind!r}, needed 'rms', 'srms' or 'layer'")
    return RMSNorm(size, eps) if kind == "rms" else SimpleRMSNorm(size, eps)


def _gate(hidden_size: int, size: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(hidden_size, size, bias=False)
    return nn.Sequential(nn.Linear(hidden_size, rank, bias=False), nn.Linear(rank, size, bias=False))
