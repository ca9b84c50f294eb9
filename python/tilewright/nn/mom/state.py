# SPDX-License-Identifier: Apache-2.0
"""What a mixture of memories carries from call to call, and the step of one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import ops
from tilewright.nn.mixer import Sequences, convolve
from tilewright.nn.mom.attention import USES_BETA, recur
from tilewright.nn.mom.dispatch import Dispatch
from tilewright.ops.delta_rule import gate_logarithm, l2_normalize

if TYPE_CHECKING:
    from tilewright.nn.mom.layer import MomAttention


class Memories:
    """The states of one layer during one call.

    A call of one token a sequence without gradients steps the rows of the chosen memories in place; any other call
    runs packed segments from the states of all memories. ``new`` holds the states to keep.
    """

    def __init__(
        self, layer: MomAttention, dispatch: Dispatch, state: Mapping[str, Tensor], *, keep_state: bool, tokens: int
    ) -> None:
        held = state.get("recurrent_state")
        if held is not None and held.shape[0] != dispatch.num_sequences:
            raise ValueError(
                f"MomAttention: the cache holds {held.shape[0]} sequences, the call has {dispatch.num_sequences}"
            )
        self.layer, self.dispatch, self.state, self.keep_state = layer, dispatch, state, keep_state
        self.new: dict[str, Tensor] = {}
        self.single = tokens == 1 and dispatch.num_sequences == dispatch.tokens
        self.places = None
        steps = held is not None and held.dtype == torch.float32 and not torch.is_grad_enabled()
        if self.single and steps:
            self.places = dispatch.states()

    def convolve(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """The short convolutions of rows `[R, C]`, each memory's own tokens one after another, split into heads."""
        held = self.state.get("conv_state")
        if self.places is None:
            state = {} if held is None else {"conv_state": self.dispatch.split_state(held)}
            inputs, lengths = (q[None], k[None], v[None]), self.dispatch.cu_seqlens
        else:
            state = {} if held is None else {"conv_state": held.flatten(0, 1)[self.places]}
            inputs, lengths = (q[:, None], k[:, None], v[:, None]), None
        streams, new = convolve(self.layer.conv, inputs, F.silu, state, Sequences(lengths, self.dispatch.order[None]))
        if "conv_state" in new and self.keep_state:
            self.new["conv_state"] = self._kept("conv_state", new["conv_state"])
        return tuple(x.flatten(0, 1).unflatten(-1, (self.layer.num_heads, -1)) for x in streams)

    def _kept(self, name: str, rows: Tensor) -> Tensor:
        """The states per sequence and memory: of all segments, or of a step's rows, written in place."""
        if self.places is None:
            return self.dispatch.join_state(rows)
        held = self.state[name]
        held.flatten(0, 1).index_copy_(0, self.places, rows.to(held.dtype))
        return held

    def recur(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, beta: Tensor | None) -> Tensor:
        """The reads `[R, H, V]` of rows `[R, H, ...]`."""
        if self.places is not None:
            return self._step(q, k, v, gates, beta)
        held, layer = self.state.get("recurrent_state"), self.layer
        token_by_token = layer.mode == "recurrent" or (layer.mode == "auto" and self.single)
        o, state = recur(
            q,
            k,
            v,
            gates,
            beta,
            initial_state=None if held is None else self.dispatch.split_state(held),
            output_final_state=self.keep_state,
            use_qk_l2norm_in_kernel=layer.backend in USES_BETA,
            cu_seqlens=self.dispatch.cu_seqlens,
            mode="recurrent" if token_by_token else "chunk",
            **self._gate_in_kernel(),
        )
        if state is not None:
            self.new["recurrent_state"] = self.dispatch.join_state(state)
        return o

    def _gate_in_kernel(self) -> dict[str, Any]:
        gated = self.layer.backend == "gated_delta_rule"
        return {"A_log": self.layer.A_log, "dt_bias": self.layer.dt_bias} if gated else {}

    def _step(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, beta: Tensor | None) -> Tensor:
        """Every row is one token of a state of its own, written in place."""
        held = self.state["recurrent_state"]
        self.new["recurrent_state"] = held
        if gates is not None and self.layer.backend == "gated_delta_rule":
            gates = gate_logarithm(gates[:, None], self.layer.A_log, self.layer.dt_bias)[:, 0]
        if beta is not None:
            q, k = l2_normalize(q), l2_normalize(k)
        o = ops.linear_attention_step_(
            q[:, None],
            k[:, None],
            v[:, None],
            held.flatten(0, 1),
            beta=None if beta is None else beta[:, None],
            g=None if gates is None else gates[:, None],
            rule="additive" if beta is None else "delta",
            state_indices=self.places,
        )
        return o[:, 0]
