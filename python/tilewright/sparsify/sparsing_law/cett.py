# SPDX-License-Identifier: Apache-2.0
"""CETT, the cumulative error of tail truncation ("ReLU^2 Wins", arXiv 2402.03804), and the threshold that reaches it.

    CETT(eps) = mean over tokens of || sum_{i: ||n_i|| < eps} n_i || / || Wo h ||,   n_i = Wo[:, i] h_i

Nothing of size [tokens, m, d] is built: ||n_i|| = |h_i| ||Wo[:, i]||, and the truncated sum is Wo times h with the
other neurons set to zero.
"""

from __future__ import annotations

import math
from bisect import insort

import torch
from torch import Tensor

from tilewright.sparsify.sparsing_law.neurons import column_norms, neuron_thresholds

# Tokens whose output is shorter than this have no ratio.
SILENT = 1e-12
# Candidates for eps lie on a logarithmic grid, neighbours 1e-4 apart; fixed, so that a threshold does not depend on
# which others were asked for before.
STEP = 1e-4
_ROWS = 512
# Two probes, one on either side of the crossing, shrink the bracket to a fiftieth.
_MARGIN = 50
_LEAST = 1e-12

Place = tuple[int, float]


class TailError:
    """CETT of one layer as a function of eps, on sample rows.

    h: inputs of the down projection [n, m], the model's own or float32/float64; kept, not copied.
    weight: Wo [d, m], of the same dtype class. rows_skipped: tokens whose output is (nearly) zero.

    Raises:
        ValueError: shapes do not fit, there is no row, or h holds NaN or infinite values.
    """

    def __init__(self, h: Tensor, weight: Tensor, name: str = "layer") -> None:
        if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name}: h has shape {list(h.shape)}, Wo {list(weight.shape)}; [n, m] and [d, m] are needed"
            )
        if not len(h):
            raise ValueError(f"{name}: no token was seen; every one was masked, or the block never ran")
        if not bool(torch.isfinite(h).all()):
            raise ValueError(f"{name}: activations hold NaN or infinite values; the model or its input is damaged")
        self.name, self.h, self.weight = name, h, weight
        self.norms = column_norms(weight)
        self.total = torch.cat([self._lengths(rows) for rows in h.split(_ROWS)])
        self.rows_skipped = int((self.total < SILENT).sum())
        smallest, largest = self._range()
        # Half a step below the smallest positive norm: no candidate is near it, so rounding cannot truncate it.
        self.floor = max(smallest, 1e-12 * largest) * math.exp(-STEP / 2)
        # The last candidate lies above every neuron of the sample.
        self.steps = math.ceil(math.log(max(largest, self.floor) / self.floor) / STEP) + 1
        self._ratio = math.exp(STEP)
        self._seen: list[Place] = []

    def _lengths(self, rows: Tensor) -> Tensor:
        """||Wo h|| of each row, the square root and what follows in float64."""
        return torch.linalg.vector_norm((rows.to(self.weight.dtype) @ self.weight.T).double(), dim=-1)

    def _range(self) -> tuple[float, float]:
        """The smallest positive ||n_i|| and the largest; 1 and 0 when all are zero."""
        smallest, largest = math.inf, 0.0
        for rows in self.h.split(_ROWS):
            norms = rows.abs().to(self.norms.dtype) * self.norms
            largest = max(largest, float(norms.max()))
            positive = norms[norms > 0]
            if len(positive):
                smallest = min(smallest, float(positive.min()))
        return (smallest, largest) if largest > 0 else (1.0, 0.0)

    def error(self, eps: float) -> float:
        """CETT(eps), over the tokens that have an output; 0 when none has."""
        bounds = neuron_thresholds(eps, self.norms)
        total, count = 0.0, 0
        for rows, whole in zip(self.h.split(_ROWS), self.total.split(_ROWS), strict=True):
            tail = self._lengths(rows.masked_fill(rows.abs() >= bounds, 0))
            heard = whole >= SILENT
            total += float((tail[heard] / whole[heard]).sum())
            count += int(heard.sum())
        return total / count if count else 0.0

    def active(self, eps: float) -> float:
        """Share of neurons that eps keeps on the sample, mean over tokens."""
        bounds = neuron_thresholds(eps, self.norms)
        kept = sum(int((rows.abs() >= bounds).sum()) for rows in self.h.split(_ROWS))
        return kept / self.h.numel()

    def candidate(self, index: int) -> float:
        """eps of a place on the grid; 0 is the smallest positive norm (keeps all but exact zeros)."""
        return self.floor * self._ratio**index

    def threshold(self, cett: float) -> float:
        """The eps whose error is at most ``cett`` while the next candidate's is above it (the last one if none is).

        The error may fall again where a truncated sum cancels, so there can be several such places; on a sample of
        hundreds of tokens they lie within a few candidates of each other. The bracket is closed from what was
        evaluated before; each probe interpolates the logarithm of the error.

        Raises:
            ValueError: cett is not in [0, 1].
        """
        if not 0 <= cett <= 1:
            raise ValueError(f"cett={cett!r}: a share of the output's length, 0 to 1, is needed")
        if cett == 0:
            return self.candidate(0)
        low, high = self._bracket(cett)
        slow = 0
        while (width := high[0] - low[0]) > 1:
            index = (low[0] + high[0]) // 2 if slow > 1 else _between(low, high, cett)
            point = (index, self.error(self.candidate(index)))
            insort(self._seen, point)
            low, high = (point, high) if point[1] <= cett else (low, point)
            slow = 0 if 2 * (high[0] - low[0]) <= width else slow + 1
        return self.candidate(low[0])

    def _bracket(self, cett: float) -> tuple[Place, Place]:
        """The last evaluated place below the crossing and the first one above it."""
        if not self._seen:
            # Above the last candidate everything is truncated; the place after it stands for "no crossing".
            self._seen = [(0, self.error(self.candidate(0))), (self.steps + 1, math.inf)]
        above = next(place for place, point in enumerate(self._seen) if point[1] > cett)
        if above == 0:
            return (-1, 0.0), self._seen[0]
        return self._seen[above - 1], self._seen[above]


def _between(low: Place, high: Place, cett: float) -> int:
    """A place strictly between two, by linear interpolation of the logarithm of the error."""
    start, end = (math.log(min(max(point[1], _LEAST), 1.0)) for point in (low, high))
    wanted = math.log(max(cett, _LEAST))
    share = (wanted - start) / (end - start) if end > start else 0.5
    width = high[0] - low[0]
    margin = max(1, width // _MARGIN)
    return min(max(low[0] + round(share * width), low[0] + margin), high[0] - margin)
