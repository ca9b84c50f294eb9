# SPDX-License-Identifier: Apache-2.0
"""Liger on the real SmolLM2-135M-Instruct: weights are reused rightly, and decoding is the full forward pass."""

from __future__ import annotations

import copy

import pytest
import torch

from tilewright import data, models
from tilewright.evaluate import tokenize
from tilewright.linearize.liger import convert_to_liger
from tilewright.linearize.runner import Runner

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def loaded(smollm2_gguf):
    return models.load(smollm2_gguf)


@pytest.fixture(scope="module")
def base(loaded):
    return models.to_transformers(loaded, dequantize=True)


@pytest.fixture(scope="module")
def ids(loaded):
    return tokenize(loaded.tokenizer, data.corpus("speeches", "evaluation"), max_tokens=200).tolist()


def test_the_softmax_branch_alone_is_the_base_model(base, ids):
    """In float64 but for transformers' norms, which round to float32: one rounding that falls otherwise is 6e-8 of its
    number, and logits are below 50."""
    exact = copy.deepcopy(base).double()
    model = convert_to_liger(exact, alpha=0.0, beta=1.0, window_size=100, inplace=True)
    with torch.no_grad():
        got = model(torch.tensor([ids[:100]])).logits
        want = copy.deepcopy(base).double()(torch.tensor([ids[:100]])).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_no_parameter_is_added(base):
    model = convert_to_liger(base)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in base.parameters())


def test_prefill_and_decode_equal_the_full_forward(base, ids):
    """32 greedy tokens behind a prompt of 200."""
    model = convert_to_liger(base, layers=range(0, 30, 5))
    runner, made, rows = Runner(model, 232), list(ids), []
    for _ in range(32):
        rows.append(runner.forward(made[len(runner.held) :])[0])
        made.append(int(rows[-1].argmax()))
    full = Runner(model, 232).logits(made[:-1])[199:]
    torch.testing.assert_close(torch.stack(rows), full, rtol=0, atol=1e-3)
    assert full.argmax(-1).tolist() == made[200:]
