# SPDX-License-Identifier: Apache-2.0
"""Causal depthwise convolution over a few tokens, before the keys, queries and values of a linear-time mixer."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.ops.sequence import SequencePiece, piece

Activation = Literal["silu"] | None


class ShortConvolution(nn.Module):
    """``y_t = act(bias + sum_{j < W} w_j o x_{t - W + 1 + j})`` for every channel by itself.

    Tokens before the first are zero, or come from ``state``. Sequences packed in one row do not see each other.

    Args:
        channels: C.
        kernel_size: W, at least 1.
        activation: "silu" or None.
        bias: whether there is one; it makes a token of zeros give something other than zero.

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self, channels: int, kernel_size: int = 4, activation: Activation = "silu", *, bias: bool = False
    ) -> None:
        super().__init__()
        if channels < 1 or kernel_size < 1:
            raise ValueError(f"ShortConvolution: channels = {channels}, kernel_size = {kernel_size}; needed 1 or more")
        if activation not in ("silu", None):
            raise ValueError(f"ShortConvolution: activation = {activation!r}, needed 'silu' or None")
        self.channels, self.kernel_size, self.activation = channels, kernel_size, activation
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights uniform in +-1/sqrt(W), as torch's depthwise convolution has them; bias 0."""
        bound = self.kernel_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve.

        Args:
            x: [B, T, C].
            state: [N, C, W - 1], the last W - 1 inputs of each sequence so far, oldest first; None: zeros.
            cu_seqlens: int [N + 1], boundaries of the N sequences packed in x (B = 1); without it N = B.

        Returns:
            y [B, T, C], and the new state [N, C, W - 1].

        Raises:
            ValueError: a shape does not fit.
        """
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self._check(x, state, sequences, cu_seqlens)
        if (here := piece()) is not None:
            state = self._from_the_piece_before(here, x, state, cu_seqlens)
        if state is None:
            state = x.new_zeros(sequences, self.channels, self.kernel_size - 1)
        if cu_seqlens is None:
            window = torch.cat((state.to(x.dtype), x.transpose(1, 2)), -1)
            y = self._convolve(window).transpose(1, 2)
            return y, window[..., window.shape[-1] - (self.kernel_size - 1) :]
        return self._packed(x[0], state.to(x.dtype), cu_seqlens)

    def _from_the_piece_before(
        self, here: SequencePiece, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        if cu_seqlens is not None or state is not None:
            what = "cu_seqlens" if state is None else "a state"
            raise ValueError(f"ShortConvolution: {what} came with pieces of sequences; give whole rows without a cache")
        return here.before(x, self.kernel_size - 1).transpose(1, 2)

    def _packed(self, x: Tensor, state: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Each sequence is preceded by its own W - 1 old tokens: one convolution serves all, and none sees another."""
        past, total, cu = self.kernel_size - 1, x.shape[0], cu_seqlens.to(torch.int64)
        lengths = cu.diff()
        owner = torch.repeat_interleave(torch.arange(lengths.numel(), device=x.device), lengths, output_size=total)
        place = torch.arange(total, device=x.device) + (owner + 1) * past
        starts = cu[:-1] + torch.arange(lengths.numel(), device=x.device) * past
        old = starts[:, None] + torch.arange(past, device=x.device)
        rows = x.new_zeros(total + lengths.numel() * past, self.channels).index_copy(0, place, x)
        rows = rows.index_copy(0, old.flatten(), state.transpose(1, 2).flatten(0, 1))
        y = self._convolve(rows.T[None])[0].T
        last = (old + lengths[:, None]).flatten()
        new_state = rows[last].view(-1, past, self.channels).transpose(1, 2)
        return y[place - past][None], new_state

    def _convolve(self, window: Tensor) -> Tensor:
        """[N, C, T + W - 1] to [N, C, T]."""
        if window.shape[-1] < self.kernel_size:
            return window[..., :0]
        if window.shape[-1] == self.kernel_size:
            y = (window * self.weight[:, 0]).sum(-1, keepdim=True)
            y = y if self.bias is None else y + self.bias[:, None]
        else:
            y = F.conv1d(window, self.weight, self.bias, groups=self.channels)
        return F.silu(y) if self.activation == "silu" else y

    def _check(self, x: Tensor, state: Tensor | None, sequences: int, cu_seqlens: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.channels:
            raise ValueError(f"ShortConvolution: x has shape {list(x.shape)}, needed [B, T, {self.channels}]")
        if cu_seqlens is not None and x.shape[0] != 1:
            raise ValueError(f"ShortConvolution: cu_seqlens needs B = 1 in x, which has shape {list(x.shape)}")
        need = [sequences, self.channels, self.kernel_size - 1]
        if state is not None and list(state.shape) != need:
            raise ValueError(f"ShortConvolution: state has shape {list(state.shape)}, needed {need}")

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, activation={self.activation!r}"


def conv_elements(conv: ShortConvolution | None) -> dict[str, int]:
    """Numbers that a convolution keeps for one sequence."""
    return {} if conv is None else {"conv_state": conv.channels * (conv.kernel_size - 1)}
