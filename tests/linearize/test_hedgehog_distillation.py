# SPDX-License-Identifier: Apache-2.0
"""The streaming loss against T x T matrices, its memory, and what distillation teaches."""

from __future__ import annotations

import pytest
import torch
from hedgehog_oracle import loss, softmax_weights, student_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright.linearize.hedgehog import (
    FeatureAttention,
    HedgehogConfig,
    HedgehogFeatureMap,
    ReLUFeatureMap,
    attention_distill_loss,
    distill,
    distillation_losses,
    softmax_teacher,
)


def inputs(tokens=21, heads=4, key_heads=2, dim=6, width=3, batch=2):
    sizes = ((heads, dim), (key_heads, dim), (key_heads, width))
    return tuple(torch.randn(batch, tokens, *size, dtype=torch.float64) for size in sizes)


def maps(heads=4, key_heads=2, dim=6):
    pair = [HedgehogFeatureMap(dim, num_heads=n).double() for n in (heads, key_heads)]
    for phi in pair:
        nn.init.normal_(phi.weight)
    return pair


def padding(tokens, padded):
    mask = torch.ones(2, tokens)
    if padded:
        mask[0, :5] = 0
        mask[1, -2:] = 0
    return mask


@pytest.mark.parametrize("kind", ["xent", "kl", "mse"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 1), (True, 6), (False, None)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_streaming_loss_and_gradients_are_those_of_the_matrices(kind, causal, window, padded, block_size):
    q, k, v = inputs()
    phi_q, phi_k = maps()
    mask = padding(21, padded)
    mix = (torch.rand(4, dtype=torch.float64) + 0.1).requires_grad_() if window else None
    learned = [phi_q.weight, phi_k.weight, *([mix] if window else [])]
    got = attention_distill_loss(
        *(q, k, phi_q, phi_k),
        causal=causal,
        kind=kind,
        v=v,
        block_size=block_size,
        attention_mask=mask if padded else None,
        window=window,
        mix=mix,
    )
    p = softmax_weights(q, k, causal=causal, mask=mask)
    a = student_weights(q, k, phi_q, phi_k, causal=causal, mask=mask, window=window, mix=mix)
    expected = loss(p, a, kind, v, mask, causal)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    gradients = zip(torch.autograd.grad(got, learned), torch.autograd.grad(expected, learned), strict=True)
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_loss_in_float32():
    q, k, _ = (x.float() for x in inputs(130))
    phi_q, phi_k = (m.float() for m in maps())
    exact = loss(
        softmax_weights(q.double(), k.double()),
        student_weights(q.double(), k.double(), phi_q, phi_k),
        "kl",
        *(None, None, True),
    )
    theirs = loss(softmax_weights(q, k), student_weights(q, k, phi_q, phi_k), "kl", None, None, True)
    mine = attention_distill_loss(q, k, phi_q, phi_k, kind="kl")
    assert mine.dtype == torch.float32
    # the same sums in tiles; one unit in the last place of the result besides
    assert abs(mine.double() - exact) <= 2 * abs(theirs.double() - exact) + torch.finfo(torch.float32).eps * exact


def test_kl_is_cross_entropy_minus_the_teachers_entropy():
    q, k, _ = inputs()
    phi_q, phi_k = maps()
    kl, xent = (attention_distill_loss(q, k, phi_q, phi_k, kind=kind) for kind in ("kl", "xent"))
    p = softmax_weights(q, k)[:, :, 1:]
    torch.testing.assert_close(xent - kl, -torch.special.xlogy(p, p).sum(-1).mean(), rtol=0, atol=1e-12)
    assert float(kl.detach()) > 0


def test_loss_is_zero_for_perfect_imitation():
    """With a window over everything the student is the softmax."""
    q, k, v = inputs(9)
    phi_q, phi_k = maps()
    mix = torch.ones(4, dtype=torch.float64)
    for kind in ("kl", "mse"):
        got = attention_distill_loss(q, k, phi_q, phi_k, kind=kind, v=v, window=9, mix=mix)
        # the denominator's eps of 1e-12
        torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-11)


def test_heads_and_rows_that_count():
    q, k, _ = inputs()
    phi_q, phi_k = maps()
    heads = attention_distill_loss(q, k, phi_q, phi_k, reduction="heads")
    torch.testing.assert_close(heads.mean(), attention_distill_loss(q, k, phi_q, phi_k))
    alone = attention_distill_loss(q[:, :, 1:2], k[:, :, :1], HedgehogFeatureMap(6), HedgehogFeatureMap(6))
    assert alone.shape == ()
    one = attention_distill_loss(q[:, :1], k[:, :1], phi_q, phi_k)  # row 0 says nothing
    assert float(one.detach()) == 0
    empty = attention_distill_loss(q[:, :0], k[:, :0], phi_q, phi_k)
    assert float(empty.detach()) == 0
    nobody = attention_distill_loss(q, k, phi_q, phi_k, attention_mask=torch.zeros(2, 21))
    assert float(nobody.detach()) == 0


def test_weights_of_zero_are_clamped():
    """A ReLU student gives weight 0 to keys that the teacher sees: the loss is large, not infinite."""
    q = torch.tensor([1.0, -1.0]).repeat(1, 4, 1, 1).double()
    k = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, -1.0], [1.0, -1.0]])[None, :, None].double()
    relu = ReLUFeatureMap(2)
    for block_size in (1, 4):
        got = attention_distill_loss(q, k, relu, relu, block_size=block_size)
        p, a = softmax_weights(q, k), student_weights(q, k, relu, relu)
        torch.testing.assert_close(got, loss(p, a, "xent", None, None, True), rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["xent", "mse"])
def test_memory_is_linear_in_the_length(kind):
    """No tensor of the loss or its gradient is larger than a tile or the features: neither is T x T."""
    largest = {}
    for tokens in (64, 256):
        q, k, v = (x.float() for x in inputs(tokens, heads=2, batch=1, width=6))
        phi_q, phi_k = (HedgehogFeatureMap(6, num_heads=2) for _ in range(2))
        with Largest() as seen:
            attention_distill_loss(q, k, phi_q, phi_k, kind=kind, v=v, block_size=16).backward()
        largest[tokens] = seen.elements
        assert phi_q.weight.grad is not None
    assert largest[256] <= 4 * largest[64]
    assert largest[256] < 256 * 256


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kind": "l2"}, "kind"),
        ({"reduction": "sum"}, "reduction"),
        ({"kind": "mse"}, "needs v"),
        ({"block_size": 0}, "block_size"),
        ({"window": 3}, "window and mix"),
        ({"window": 3, "mix": torch.ones(4), "causal": False}, "causal"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask"),
    ],
)
def test_wrong_arguments_of_the_loss(change, word):
    q, k, _ = inputs()
    with pytest.raises(ValueError, match=word):
        attention_distill_loss(q, k, *maps(), **change)


# --- distillation of a small model --------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention with a residual, nothing else."""

    def __init__(self, config, causal):
        super().__init__()
        self.projections = nn.Linear(12, 36)
        self.attention = FeatureAttention(6, 2, config=config, causal=causal)

    def forward(self, x, mask=None):
        q, k, v = self.projections(x).unflatten(-1, (3, 2, 6)).unbind(2)
        return x + self.attention(q, k, v, mask)[0].flatten(2)


class Small(nn.Module):
    """Two layers."""

    def __init__(self, config=None, causal=True):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.projections.weight, std=0.6)

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x


def batches(count=4, tokens=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens, 12, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind", ["xent", "mse"])
@pytest.mark.parametrize(
    ("settings", "causal"), [({}, True), ({}, False), ({"activation": "exp_dim"}, True), ({"window_size": 4}, True)]
)
def test_distillation_brings_every_layer_nearer_to_its_teacher(kind, settings, causal):
    model = Small(HedgehogConfig(**settings), causal)
    held_out = batches(seed=1)
    before = distillation_losses(model, held_out, kind=kind)
    frozen = {name: p.clone() for name, p in model.named_parameters() if "projections" in name}
    with softmax_teacher(model):
        teacher = model(held_out[0])
    report = distill(model, batches(), steps=30, kind=kind)
    after = distillation_losses(model, held_out, kind=kind)
    assert before.keys() == after.keys() == {"layers.0.attention", "layers.1.attention"}
    assert all(bool(after[name].mean() < before[name].mean()) for name in before)
    assert report["steps"] == len(report["losses"]) == 30
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    with softmax_teacher(model):
        assert torch.equal(model(held_out[0]), teacher)


def test_each_layer_learns_from_the_teachers_hidden_states():
    """Spoiling the first layer's maps leaves the second layer's loss alone."""
    model = Small()
    before = distillation_losses(model, batches())
    nn.init.normal_(model.layers[0].attention.phi_q.weight)
    after = distillation_losses(model, batches())
    assert not torch.equal(before["layers.0.attention"], after["layers.0.attention"])
    assert torch.equal(before["layers.1.attention"], after["layers.1.attention"])


def test_mode_and_flags_are_put_back():
    model = Small().train()
    model.layers[0].projections.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    distill(model, lambda step: (batches(seed=step)[0], torch.zeros(1)), steps=2)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(layer.attention.observer is None for layer in model.layers)


def test_padding_is_not_distilled():
    x = batches(1)[0]
    mask = torch.ones(2, 24)
    mask[:, 20:] = 0
    model = Small()
    losses = []
    for fill in (0.0, 3.0):
        padded = torch.where(mask[..., None].bool(), x, fill)
        losses.append(distillation_losses(model, [{"x": padded, "attention_mask": mask}]))
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


def test_a_loss_that_is_no_number_names_layer_and_head():
    model = Small()
    with torch.no_grad():
        model.layers[1].attention.phi_k.weight[1, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"layers\.1\.attention, head 1"):
        distill(model, batches(), steps=1)
    assert model.layers[1].attention.observer is None


def test_nothing_to_distil():
    with pytest.raises(ValueError, match="no Hedgehog attention"):
        distill(nn.Linear(2, 2), batches(), steps=1)
    with pytest.raises(ValueError, match="fixed maps"):
        distill(Small(HedgehogConfig("elu")), batches(), steps=1)
    with pytest.raises(ValueError, match="steps=0"):
        distill(Small(), batches(), steps=0)
    with pytest.raises(ValueError, match="empty"):
        distill(Small(), [], steps=1)
    with pytest.raises(ValueError, match="empty"):
        distillation_losses(Small(), [])
    with pytest.raises(ValueError, match="window_size"):
        Small(HedgehogConfig(window_size=4), causal=False)
