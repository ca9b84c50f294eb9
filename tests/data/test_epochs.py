# SPDX-License-Identifier: Apache-2.0
"""Every example once an epoch, the same rows of every tensor, the same batch for the same step."""

from __future__ import annotations

import pytest
import torch

from tilewright.data.epochs import Epochs


def test_an_epoch_has_every_example_once():
    x = torch.arange(12)
    epochs = Epochs((x, 10 * x), batch=4, seed=1)
    assert epochs.steps == 3
    first, second = ([epochs(3 * epoch + i) for i in range(3)] for epoch in range(2))
    for batches in (first, second):
        assert sorted(torch.cat([a for a, _ in batches]).tolist()) == list(range(12))
        assert all(torch.equal(10 * a, b) for a, b in batches)
    assert [a.tolist() for a, _ in first] != [a.tolist() for a, _ in second]
    assert torch.equal(epochs(4)[0], second[1][0])


def test_an_incomplete_batch_is_left_out():
    epochs = Epochs((torch.arange(10),), batch=4)
    seen = {int(i) for step in range(2) for i in epochs(step)[0]}
    assert len(seen) == 8


def test_tensors_of_unlike_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 4\] rows"):
        Epochs((torch.zeros(3), torch.zeros(4)), 2)
    with pytest.raises(ValueError, match="batch=4"):
        Epochs((torch.zeros(3),), 4)
