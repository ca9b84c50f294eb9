# SPDX-License-Identifier: Apache-2.0
"""Mixers against independent implementations: transformers' layers with copied weights, parallel forms, scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import lfilter
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxConfig, MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

from tilewright.nn import (
    HGRN,
    HGRN2,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    LightningAttention,
    LinearAttention,
    MixerCache,
    MultiScaleRetention,
    SoftmaxAttention,
)
from tilewright.nn.hgrn import LowerBounds
from tilewright.nn.rotary import apply_rotary

D = 24
# The specifications' bounds: float32 against another float32 implementation, and float64 against written-out sums.
SINGLE, DOUBLE = 1e-5, 1e-10


def distance(got: Tensor, need: Tensor) -> float:
    assert got.shape == need.shape
    got, need = got.detach().double(), need.detach().double()
    return float((got - need).norm() / need.norm())


def draw(module: nn.Module) -> None:
    """Weights of every kind away from what they start as; rates and slopes stay moderate."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() == 1 or name.endswith("A_log"):
                p.copy_(torch.rand_like(p) * 0.5 + 0.5)
            else:
                p.normal_(std=p.shape[-1] ** -0.5)


def copy_weights(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(theirs.reshape(ours.shape))


def gated_delta_nets() -> tuple[Qwen3NextGatedDeltaNet, GatedDeltaNet, Qwen3NextConfig]:
    """Two key heads, six value heads; transformers keeps q, k, v and z of a key head together."""
    config = Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=2,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=5,
        linear_value_head_dim=7,
        layer_types=["linear_attention", "full_attention"],
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    draw(theirs)
    ours = GatedDeltaNet(D, 2, head_dim=5, num_v_heads=6, expand_v=1.4, norm_eps=config.rms_norm_eps)
    grouped = theirs.in_proj_qkvz.weight.view(2, 2 * 5 + 2 * 3 * 7, D)
    q, k, v, z = grouped.split([5, 5, 21, 21], 1)
    b, a = theirs.in_proj_ba.weight.view(2, 6, D).split([3, 3], 1)
    linears = [
        (ours.q_proj, q),
        (ours.k_proj, k),
        (ours.v_proj, v),
        (ours.g_proj, z),
        (ours.b_proj, b),
        (ours.a_proj, a),
    ]
    copy_weights([(linear.weight, weight) for linear, weight in linears])
    copy_weights(
        [
            (ours.conv.weight, theirs.conv1d.weight),
            (ours.A_log, theirs.A_log),
            (ours.dt_bias, theirs.dt_bias),
            (ours.o_norm.weight, theirs.norm.weight),
            (ours.o_proj.weight, theirs.out_proj.weight),
        ]
    )
    return theirs, ours, config


@torch.no_grad()
def test_gated_deltanet_equals_qwen3_next():
    theirs, ours, config = gated_delta_nets()
    x = torch.randn(2, 75, D)
    assert distance(ours(x)[0], theirs(x)) <= SINGLE
    cache, own = DynamicCache(config=config), MixerCache()
    theirs(x[:, :70], cache=cache)
    ours(x[:, :70], past_key_values=own)
    assert distance(own[0]["recurrent_state"], cache.get_recurrent_state(0)) <= SINGLE
    for t in range(70, 75):
        need = theirs(x[:, t : t + 1], cache=cache)
        assert distance(ours(x[:, t : t + 1], past_key_values=own)[0], need) <= SINGLE
    assert distance(own[0]["recurrent_state"], cache.get_recurrent_state(0)) <= SINGLE


def test_gated_deltanet_has_the_gradients_of_qwen3_next():
    theirs, ours, _ = gated_delta_nets()
    x, weights = torch.randn(2, 20, D), torch.randn(2, 20, D)
    gradients = []
    for layer, output in ((theirs, lambda t: theirs(t)), (ours, lambda t: ours(t)[0])):
        probe = x.clone().requires_grad_()
        (output(probe) * weights).sum().backward()
        gradients.append((probe.grad, layer.A_log.grad, layer.dt_bias.grad))
    # Both are float32 of another order of sums; a gradient passes twice as many of them as a value.
    for need, got in zip(*gradients, strict=True):
        assert distance(got, need) <= 2 * SINGLE


@torch.no_grad()
def test_kimi_delta_attention_equals_kimi_linear():
    config = KimiLinearConfig(
        hidden_size=D,
        num_hidden_layers=2,
        linear_num_heads=3,
        linear_head_dim=6,
        layer_types=["linear_attention", "full_attention"],
    )
    theirs = KimiLinearDeltaAttention(config, 0)
    draw(theirs)
    ours = KimiDeltaAttention(D, 3, head_dim=6, norm_eps=config.rms_norm_eps)
    gate = theirs.forget_gate
    names = ("q_proj", "k_proj", "v_proj", "b_proj", "o_proj", "o_norm")
    copy_weights([(getattr(ours, name).weight, getattr(theirs, name).weight) for name in names])
    copy_weights(
        [
            (ours.conv.weight, theirs.conv1d.weight),
            (ours.f_proj[0].weight, gate.f_a_proj.weight),
            (ours.f_proj[1].weight, gate.f_b_proj.weight),
            (ours.g_proj[0].weight, theirs.g_a_proj.weight),
            (ours.g_proj[1].weight, theirs.g_b_proj.weight),
            (ours.A_log, gate.A_log),
            (ours.dt_bias, gate.dt_bias),
        ]
    )
    x, cache = torch.randn(2, 70, D), DynamicCache(config=config)
    assert distance(ours(x)[0], theirs(x)) <= SINGLE
    theirs(x, cache=cache)
    _, _, own = ours(x, use_cache=True)
    assert distance(own[0]["recurrent_state"], cache.get_recurrent_state(0)) <= SINGLE


@pytest.mark.parametrize("layer", [0, 2, 4])
@torch.no_grad()
def test_lightning_equals_minimax(layer):
    """300 tokens of prefill (blocks of 256, the last one ragged), then 20 steps, states included."""
    config = MiniMaxConfig(
        hidden_size=D,
        num_attention_heads=4,
        head_dim=6,
        num_hidden_layers=5,
        layer_types=["linear_attention"] * 5,
    )
    theirs = MiniMaxLightningAttention(config, layer)
    draw(theirs)
    ours = LightningAttention(D, 4, 6, layer_idx=layer, num_layers=5)
    # Layer l of L falls by l / (L - 1) in the papers, by l / (L - 1 + 1e-5) there; else the slopes are one formula,
    # the base's power in float32 (16 roundings at most). The outputs are compared under their slopes.
    slopes, factor = theirs.slope_rate.flatten(), 1 - layer / 4 + 1e-5
    apart = (torch.tensor(ours.slopes) - slopes).abs()
    assert (apart <= slopes / factor * (1e-5 * layer / 16 + 16 * 2.0**-24)).all()
    ours.slopes = slopes.tolist()
    q, k, v = theirs.qkv_proj.weight.view(4, 18, D).split(6, 1)
    copy_weights([(ours.q_proj.weight, q), (ours.k_proj.weight, k), (ours.v_proj.weight, v)])
    copy_weights(
        [
            (ours.output_gate.weight, theirs.output_gate.weight),
            (ours.norm.weight, theirs.norm.weight),
            (ours.o_proj.weight, theirs.out_proj.weight),
        ]
    )
    x, cache, own = torch.randn(1, 320, D), MiniMaxCache(), MixerCache()
    assert distance(ours(x[:, :300], past_key_values=own)[0], theirs(x[:, :300], None, None, cache)[0]) <= SINGLE
    for t in range(300, 320):
        need = theirs(x[:, t : t + 1], None, None, cache)[0]
        assert distance(ours(x[:, t : t + 1], past_key_values=own)[0], need) <= SINGLE
    assert distance(own[layer]["recurrent_state"], cache.get_linear_cache(layer)) <= SINGLE


@torch.no_grad()
def test_softmax_equals_llama():
    config = LlamaConfig(hidden_size=D, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
    theirs, ours = LlamaAttention(config, 0), SoftmaxAttention(D, 4, num_kv_heads=2)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        copy_weights([(getattr(ours, name).weight, getattr(theirs, name).weight)])
    x, positions = torch.randn(2, 33, D), torch.arange(33)[None]
    mask = torch.full((33, 33), -torch.inf).triu(1)[None, None]
    need = theirs(x, LlamaRotaryEmbedding(config)(x, positions), mask)[0]
    assert distance(ours(x)[0], need) <= SINGLE


@torch.no_grad()
def test_retention_equals_its_parallel_form():
    """``O = ((Q K^T) o M) V / sqrt(K)`` with ``M_ij = gamma^(i - j)`` for i >= j (arXiv 2307.08621, eq. 5)."""
    layer = MultiScaleRetention(D, 3).double()
    x, place = torch.randn(1, 41, D, dtype=torch.float64), torch.arange(41)
    q, k = (apply_rotary(w(x).unflatten(-1, (3, 8)), place[None], 10000.0)[0] for w in (layer.q_proj, layer.k_proj))
    v = layer.v_proj(x).unflatten(-1, (3, 16))[0]
    gamma = 1 - 2.0 ** -(5 + torch.arange(3, dtype=torch.float64))
    apart = (place[:, None] - place)[None]
    decay = torch.where(apart >= 0, gamma[:, None, None] ** apart.clamp(min=0), 0.0)
    scores = torch.einsum("ihk,jhk->hij", q, k) / 8**0.5 * decay
    o = torch.einsum("hij,jhv->ihv", scores, v)
    gate = layer.g_proj(x)[0].unflatten(-1, (3, 16))
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * F.silu(gate)
    # The operator's decays are rounded to float32: |d(gamma^n)| <= n eps gamma^n, n <= 40.
    assert distance(layer(x)[0][0], layer.o_proj(normed.flatten(-2))) <= 41 * 2.0**-24


def test_retention_is_blind_to_where_it_starts():
    """Rotary positions are relative: shifting all of them changes nothing."""
    layer, x = MultiScaleRetention(D, 3).double(), torch.randn(2, 11, D, dtype=torch.float64)
    shifted, _, _ = layer(x, position_ids=torch.arange(11)[None] + 500)
    assert distance(shifted, layer(x)[0]) <= DOUBLE


@pytest.mark.parametrize("bound", [None, 0.7])
@torch.no_grad()
def test_hgrn_equals_a_filter_per_channel(bound):
    """With the gates frozen, each channel is the filter ``h[t] = a h[t-1] + x[t]`` of scipy."""
    layer = HGRN(D).double()
    layer.f_proj.weight.zero_()
    logits = torch.randn(D, dtype=torch.float64)
    x = torch.randn(1, 60, D, dtype=torch.float64)
    x[..., 0] = 1.0  # the first input is constant, so that it carries the frozen gates
    layer.f_proj.weight[:, 0] = logits
    lower = None if bound is None else torch.full((D,), bound, dtype=torch.float64)
    a = torch.sigmoid(logits) if bound is None else bound + (1 - bound) * torch.sigmoid(logits)
    written = (1 - a) * F.silu(layer.i_proj(x[0]))
    h = np.stack([lfilter([1.0], [1.0, -float(a[c])], written[:, c].numpy()) for c in range(D)], axis=1)
    state = torch.from_numpy(h)
    normed = state / (state.square().mean(-1, keepdim=True) + 1e-5).sqrt() * F.silu(layer.g_proj(x[0]))
    y, _, cache = layer(x, use_cache=True, lower_bound=lower)
    assert distance(y[0], layer.o_proj(normed)) <= DOUBLE
    assert distance(cache[0]["recurrent_state"][0], state[-1]) <= DOUBLE


def written_out(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """``o_t = sum_{s <= t} (q_t . prod_{s < r <= t} decay_r k_s) v_s``: every pair of tokens by itself, [T, H, *]."""
    rows = []
    for t in range(q.shape[0]):
        o, kept = torch.zeros_like(v[0]), torch.ones_like(decay[0])
        for s in range(t, -1, -1):
            o = o + (q[t] * kept * k[s]).sum(-1, keepdim=True) * v[s]
            kept = kept * decay[s]
        rows.append(o)
    return torch.stack(rows)


@torch.no_grad()
def test_gated_linear_attention_equals_its_sum():
    layer = GatedLinearAttention(D, 2, gate_rank=3).double()
    x = torch.randn(1, 13, D, dtype=torch.float64)
    q, k = (w(x[0]).unflatten(-1, (2, 6)) for w in (layer.q_proj, layer.k_proj))
    v, gate = (w(x[0]).unflatten(-1, (2, 12)) for w in (layer.v_proj, layer.g_proj))
    decay = torch.sigmoid(layer.gk_proj(x[0])).unflatten(-1, (2, 6)) ** (1 / 16)
    o = written_out(q, k, v, decay) / 6**0.5
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * F.silu(gate)
    assert distance(layer(x)[0][0], layer.o_proj(normed.flatten(-2))) <= DOUBLE


@torch.no_grad()
def test_hgrn2_equals_its_sum():
    layer, lower = HGRN2(D, 2).double(), torch.linspace(0, 0.8, D, dtype=torch.float64)
    x = torch.randn(1, 13, D, dtype=torch.float64)
    a = (lower + (1 - lower) * torch.sigmoid(layer.f_proj(x[0]))).unflatten(-1, (2, 12))
    q, v = F.silu(layer.q_proj(x[0])).unflatten(-1, (2, 12)), layer.i_proj(x[0]).unflatten(-1, (2, 12))
    o = written_out(q, 1 - a, v, a).flatten(-2) / 12**0.5
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert distance(layer(x, lower_bound=lower)[0][0], layer.o_proj(normed)) <= DOUBLE


@torch.no_grad()
def test_linear_attention_equals_its_weighted_mean():
    layer = LinearAttention(D, 2).double()
    x = torch.randn(1, 13, D, dtype=torch.float64)
    q, k, v = (w(x[0]).unflatten(-1, (2, 12)) for w in (layer.q_proj, layer.k_proj, layer.v_proj))
    weights = torch.einsum("ihk,jhk->hij", F.elu(q) + 1, F.elu(k) + 1).tril()
    o = torch.einsum("hij,jhv->ihv", weights / weights.sum(-1, keepdim=True), v)
    # The operator adds 1e-10 to sums of at least 1e-2 here.
    assert distance(layer(x)[0][0], layer.o_proj(o.flatten(-2))) <= 1e-8


def test_lower_bounds_rise_from_zero_and_stay_below_one():
    bounds = LowerBounds(6, 5)
    torch.testing.assert_close(bounds(), (torch.arange(6) / 6.0)[:, None].expand(6, 5))
    nn.init.normal_(bounds.table, std=2.0)
    values = bounds()
    assert not values[0].any()
    assert (values[1:] > values[:-1]).all()
    assert (values < 1).all()
    values.sum().backward()
    assert bounds.table.grad.abs().sum() > 0
