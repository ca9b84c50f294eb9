# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: each process holds a stretch of time, layers pass on what the next stretch needs.

A linear-attention layer maps the state at the start of a stretch to that at its end by ``S -> M S + B``
(``tilewright.ops.state_transition``; arXiv 2406.06484, section 3.3). All processes work out (M, B) of their stretch at
once, gather them, combine those before them from left to right, and run their stretch from the true state. What is sent
is K (K + V) numbers a head whatever the length. A short convolution gets the last tokens of the stretch before;
softmax attention gathers all keys and values.

Gradients flow back through the same collectives, so the backward pass needs nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tilewright.ops.sequence import Operator, StateResult, use_piece


class _Gather(torch.autograd.Function):
    """The tensors of all processes of a group, stacked [P, ...]; the gradient is the sum of all processes' for mine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, x.contiguous(), group=group)
        return torch.stack(pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


def gather(x: Tensor, group: Any) -> Tensor:
    """Tensors of one shape from all processes of a group, stacked [P, ...], differentiable.

    Every process must use its result in the same places, on the path to the loss or off it: the backward pass is a
    collective too.
    """
    stacked: Tensor = _Gather.apply(x, group)
    return stacked


class Stretch:
    """A piece of the sequences of a process group; see ``tilewright.ops.sequence.SequencePiece``."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def offset(self, tokens: int) -> int:
        """Position of the first token here."""
        return self.rank * tokens

    def before(self, x: Tensor, count: int) -> Tensor:
        """The ``count`` tokens before this piece, zeros before the sequence: [B, count, ...]."""
        kept = min(count, x.shape[1])
        tails = gather(x[:, x.shape[1] - kept :], self.group)
        past = x.new_zeros(x.shape[0], count, *x.shape[2:])
        return torch.cat([past, *tails], 1)[:, self.rank * kept : self.rank * kept + count]

    def until_here(self, x: Tensor) -> Tensor:
        """The tokens of this piece and of those before it: [B, offset + T, ...]."""
        return torch.cat(list(gather(x, self.group)), 1)[:, : (self.rank + 1) * x.shape[1]]

    def linear_attention(
        self,
        engine: Operator,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        **options: Any,
    ) -> StateResult:
        """See :func:`sequence_parallel_linear_attention`; ``engine`` runs one piece from a given state."""
        from tilewright.ops.linear_attention import state_transition

        shared = {name: options.get(name) for name in ("beta", "g", "cu_seqlens")}
        with use_piece(None):
            change, written = state_transition(k, v=v, rule=options.get("rule", "additive"), **shared)
            maps = gather(torch.cat([change, written], -1), self.group)
            key_size = change.shape[-1]
            states = [torch.zeros_like(written) if initial_state is None else initial_state.to(written.dtype)]
            for one in maps:
                states.append(one[..., :key_size] @ states[-1] + one[..., key_size:])
            # Taken out of all of them, so that every process' graph reaches the gathering.
            incoming = torch.stack(states)[self.rank]
            o, _ = engine(q, k, v, initial_state=incoming, output_final_state=False, **options)
        return o, states[-1] if output_final_state else None

    def hgrn(
        self,
        engine: Operator,
        x: Tensor,
        g: Tensor,
        *,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        **options: Any,
    ) -> StateResult:
        """``h_t = exp(g_t) h_{t-1} + x_t`` over all pieces, without packed sequences; a piece's map is diagonal."""
        if options.get("cu_seqlens") is not None:
            raise ValueError("cu_seqlens: packed sequences cannot be cut into pieces here; give whole rows")
        with use_piece(None):
            _, written = engine(x, g, output_final_state=True)
            assert written is not None
            maps = gather(torch.stack([g.to(written.dtype).sum(1).exp(), written]), self.group)
            states = [torch.zeros_like(written) if initial_state is None else initial_state.to(written.dtype)]
            for decay, one in maps:
                states.append(decay * states[-1] + one)
            h, _ = engine(x, g, initial_state=torch.stack(states)[self.rank])
        return h, states[-1] if output_final_state else None


MIXERS = frozenset(
    {
        "deltanet",
        "gated_deltanet",
        "gla",
        "hedgehog",
        "hgrn",
        "hgrn2",
        "kda",
        "lightning",
        "linear_attention",
        "retnet",
        "sliding_window",
        "softmax",
    }
)
"""Token mixers that look beyond their piece."""


def require_pieces(model: nn.Module) -> None:
    """Raise unless all layers of a model work on pieces of sequences.

    Known are the hybrid language models over :data:`MIXERS`. A model of one's own that asks
    ``tilewright.ops.sequence.piece()`` wherever tokens meet says so by an attribute ``works_in_pieces = True``.

    Raises:
        ValueError: naming the mixer, or the model.
    """
    if getattr(model, "works_in_pieces", False):
        return
    names = {name for module in model.modules() if isinstance(name := getattr(module, "mixer_name", None), str)}
    if not names:
        raise ValueError(
            f"{type(model).__name__}: sequence parallelism is known to work for tilewright.nn.HybridForCausalLM alone; "
            "train with sequence=1, or set works_in_pieces = True on a model that asks for its piece"
        )
    if other := sorted(names - MIXERS):
        raise ValueError(
            f"mixer {other[0]!r} cannot look beyond its piece of a sequence; train with sequence=1, or use "
            f"{', '.join(sorted(MIXERS))}"
        )


@contextlib.contextmanager
def sequence_parallel(group: Any) -> Iterator[None]:
    """Inside, the layers of ``tilewright.nn`` take their inputs for this process' piece of the sequences.

    group: the process group that holds the pieces, in the order of its ranks; all pieces have the same length. None:
        sequences are whole, nothing changes. Forward and backward must both run inside.
    """
    if group is None:
        yield
        return
    with use_piece(Stretch(group)):
        yield


def sequence_parallel_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, group: Any, **options: Any) -> StateResult:
    """``tilewright.ops.linear_attention`` over sequences cut into pieces, one for each process of ``group`` in order.

    Arguments and results are those of ``linear_attention`` for this process' piece, [B, T_piece, H, K] and so on;
    ``initial_state`` is that of the whole sequence and must be the same everywhere, and the final state returned is
    that of the whole sequence, everywhere. With ``cu_seqlens`` the n-th packed sequence of a process continues the n-th
    of the process before it. Lengths may differ between processes; each holds at least one token.
    """
    from tilewright.ops.linear_attention import linear_attention

    return Stretch(group).linear_attention(linear_attention, q, k, v, **options)
