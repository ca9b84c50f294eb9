# SPDX-License-Identifier: Apache-2.0
"""The forget gates of HGRN and HGRN2, and their lower bounds over the layers (arXiv 2311.04823, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.nn.norms import wide


class LowerBounds(nn.Module):
    """``lb_l = sum_{m <= l} softmax_layers(Gamma)_m - softmax_layers(Gamma)_0``: 0 in layer 0, rising, below 1 (eq. 5).

    Deep layers forget slowly. The table starts as zeros, so that ``lb_l = l / L``.

    Args:
        num_layers: L, all layers of the stack, whatever their mixer.
        size: gates of a layer.
    """

    def __init__(self, num_layers: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_layers, size))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Zeros."""
        del generator
        nn.init.zeros_(self.table)

    def forward(self) -> Tensor:
        """The bounds [L, size], float32."""
        shares = wide(self.table).softmax(0)
        return shares.cumsum(0) - shares[0]


def log_forget_gate(logits: Tensor, lower_bound: Tensor | None) -> Tensor:
    """``log(lb + (1 - lb) sigmoid(logits))`` in float32, formed in log space so that no gate rounds to 1.

    Args:
        logits: [..., D].
        lower_bound: [D], in [0, 1); None for zero.
    """
    log_sigmoid = F.logsigmoid(wide(logits))
    if lower_bound is None:
        return log_sigmoid
    lower_bound = lower_bound.to(log_sigmoid.dtype)
    # log 0 would make the gradient of a bound of exactly zero NaN; such gates are the plain sigmoid.
    positive = lower_bound > 0
    safe = torch.where(positive, lower_bound, 0.5)
    bounded = torch.logaddexp(safe.log(), torch.log1p(-safe) + log_sigmoid)
    return torch.where(positive, bounded, log_sigmoid)
