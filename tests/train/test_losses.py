# SPDX-License-Identifier: Apache-2.0
"""Losses count what they score and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tilewright.data.recall import IGNORE
from tilewright.train import mean_loss, regression_loss, token_accuracy, token_loss


class Fixed(nn.Module):
    """Gives the same output whatever the input."""

    def __init__(self, out, wrapped=False):
        super().__init__()
        self.out = nn.Parameter(out)
        self.wrapped = wrapped

    def forward(self, _):
        return SimpleNamespace(logits=self.out) if self.wrapped else self.out


@pytest.mark.parametrize("wrapped", [False, True])
def test_token_loss_is_the_sum_of_scored_negative_log_likelihoods(wrapped):
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[1, IGNORE, 4], [IGNORE, IGNORE, 0]])
    total, count = token_loss(Fixed(logits.float(), wrapped), (torch.zeros(2, 3), labels))
    # Each of three terms is the logarithm of a sum of 5 numbers below e^8, minus one of them, in float32.
    likelihoods = logits.float().double().log_softmax(-1)
    expected = -sum(likelihoods[b, t, labels[b, t]] for b, t in [(0, 0), (0, 2), (1, 2)])
    bound = 3 * 8 * 8 * torch.finfo(torch.float32).eps
    assert float(total.detach()) == pytest.approx(float(expected.detach()), abs=bound)
    assert int(count) == 3


def test_regression_loss_skips_nan_labels_and_keeps_gradients_finite():
    out = torch.tensor([[1.0, 2.0], [5.0, 7.0]])
    labels = torch.tensor([[0.0, torch.nan], [torch.nan, 4.0]])
    model = Fixed(out)
    total, count = regression_loss(model, (out, labels))
    total.backward()
    assert (float(total.detach()), int(count)) == (10.0, 2)
    assert model.out.grad.tolist() == [[2.0, 0.0], [0.0, 6.0]]
    with pytest.raises(ValueError, match=r"\[2, 2\] for labels \[2, 1\]"):
        regression_loss(model, (out, labels[:, :1]))


def test_means_weigh_every_scored_token_alike():
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 1] = 3.0
    one = (torch.zeros(1, 2), torch.tensor([[1, IGNORE]]))
    two = (torch.zeros(1, 2), torch.tensor([[1, 2]]))
    model = Fixed(logits).train()
    right = -torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64).log_softmax(0)[0]
    expected = (2 * right + torch.log(torch.tensor(4.0, dtype=torch.float64))) / 3
    assert mean_loss(model, [one, two]) == pytest.approx(float(expected), rel=8 * torch.finfo(torch.float32).eps)
    assert token_accuracy(model, [one, two]) == 2 / 3
    assert model.training


def test_nothing_to_score_is_an_error():
    nothing = (torch.zeros(1, 2), torch.full((1, 2), IGNORE))
    for score in (mean_loss, token_accuracy):
        with pytest.raises(ValueError, match="score nothing"):
            score(Fixed(torch.zeros(1, 2, 4)), [nothing])
