# SPDX-License-Identifier: Apache-2.0
"""What a mixture of memories carries from call to call, and the step of one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tilewright import ops
from tilewright.nn.cache import MixerCache
from tilewright.nn.mom.attention import USES_BETA, recur
from tilewright.nn.mom.dispatch import Dispatch
from tilewright.ops.delta_rule import l2_normalize

if TYPE_CHECKING:
    from tilewright.nn.mom.layer import MomAttention

CONVOLVED = ("q", "k", "v")


class Memory:
    """The states of one layer during one call.

    Held in the cache as ``recurrent_state`` `[B, M, H, K, V]` and ``q_conv_state``, ``k_conv_state``, ``v_conv_state``
    `[B, M, C, W - 1]`, an always-on memory last. A call of one token without gradients steps the rows of the chosen
    memories in place; any other call runs packed segments from the states of all memories.
    """

    def __init__(self, layer: MomAttention, dispatch: Dispatch, length: int, cache: MixerCache | None, write: bool) -> None:
        if cache is not None and layer.layer_idx is None:
            raise ValueError("MomAttention: a cache needs layer_idx, the layer's place in it; it is None")
        self.layer, self.dispatch, self.length = layer, dispatch, length
        self.cache, self.write = cache, write and cache is not None
        self.saved: dict[str, Tensor] = {} if cache is None else dict(cache[layer.layer_idx or 0])
        self._check()
        grows = length == 1 and dispatch.num_sequences == dispatch.tokens
        self.steps = "recurrent_state" in self.saved and grows and not torch.is_grad_enabled()
        self.places = dispatch.states() if self.steps else None

    def _check(self) -> None:
        state = self.saved.get("recurrent_state")
        if state is not None and state.shape[0] != self.dispatch.num_sequences:
            raise ValueError(
                f"MomAttention: the cache holds {state.shape[0]} sequences, the call has {self.dispatch.num_sequences}"
            )

    def convolve(self, *inputs: Tensor) -> list[Tensor]:
        """The short convolutions of q, k and v rows `[R, C]`, each memory's own tokens one after another."""
        if not self.layer.use_short_conv:
            return list(inputs)
        return [self._convolve(name, x) for name, x in zip(CONVOLVED, inputs, strict=True)]

    def _convolve(self, name: str, x: Tensor) -> Tensor:
        module, key = getattr(self.layer, f"{name}_conv1d"), f"{name}_conv_state"
        state = self.saved.get(key)
        if self.steps and state is not None:
            pool = self._pool(key)
            y, new = module(x[:, None], pool[self.places])
            pool[self.places] = new.to(pool.dtype)
            return y[:, 0]
        segments = None if state is None else self.dispatch.split_state(state)
        y, new = module(x[None], segments, self.dispatch.cu_seqlens)
        if self.write:
            self.saved[key] = self.dispatch.join_state(new)
        return y[0]

    def recur(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> Tensor:
        """The reads `[R, H, V]` of rows `[R, H, ...]`."""
        if self.steps:
            return self._step(q, k, v, g, beta)
        state = self.saved.get("recurrent_state")
        o, state = recur(
            q,
            k,
            v,
            g,
            beta,
            op=self.layer.backend,
            initial_state=None if state is None else self.dispatch.split_state(state),
            output_final_state=self.write,
            use_qk_l2norm_in_kernel=self.layer.backend in USES_BETA,
            cu_seqlens=self.dispatch.cu_seqlens,
            mode=self.layer.mode,
        )
        if state is not None:
            self.saved["recurrent_state"] = self.dispatch.join_state(state)
        return o

    def _step(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> Tensor:
        """Every row is one token of a state of its own."""
        pool = self._pool("recurrent_state")
        q, k, v = q[:, None], k[:, None], v[:, None]
        if beta is not None:
            g = torch.zeros_like(beta) if g is None else g
            q, k = l2_normalize(q), l2_normalize(k)
            o = ops.gated_delta_rule_decode(
                q, k, v, pool, g=g[:, None], beta=beta[:, None], state_indices=self.places
            )
            return o[:, 0]
        o, new = ops.linear_attention(
            q,
            k,
            v,
            g=None if g is None else g[:, None],
            initial_state=pool[self.places],
            output_final_state=True,
            mode="recurrent",
        )
        pool[self.places] = new
        return o[:, 0]

    def _pool(self, key: str) -> Tensor:
        """The cached tensor with one row a (sequence, memory), to be written in place unless the cache is only read."""
        if not self.write:
            self.saved[key] = self.saved[key].clone()
        return self.saved[key].flatten(0, 1)

    def store(self) -> None:
        """Put the states back into the cache."""
        if self.write and self.cache is not None:
            self.cache.update(self.layer.layer_idx or 0, self.length, **self.saved)
