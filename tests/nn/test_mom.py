# SPDX-License-Identifier: Apache-2.0
"""Mixture of memories: routing, the packed form and the layer against the token loop, decode, the balance loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tilewright import ops
from tilewright.nn.cache import MixerCache
from tilewright.nn.delta_rule import DeltaNet, GatedDeltaNet
from tilewright.nn.mom import (
    OPS,
    MomAttention,
    load_balancing_loss,
    mom_attention,
    mom_route,
)
from tilewright.nn.mom.attention import USES_BETA, USES_GATE
from tilewright.nn.mom.dispatch import Dispatch
from tilewright.nn.mom.grouped import GroupedLinear
from tilewright.reference.mom import mixture_of_memories, mom_layer

# What the packed form may lose against the token loop: both are sums of at most a few hundred rounded products.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def error(got: torch.Tensor, need: torch.Tensor) -> float:
    """Relative L2; the absolute one where zeros are needed."""
    got, need = got.detach().double(), need.detach().double()
    return float((got - need).norm() / (need.norm() if need.any() else 1.0))


def draw(op, memories, topk, batch=2, tokens=9, heads=2, key_size=4, value_size=3, *, per_slot_q=False, seed=0):
    """Inputs of mom_attention in float64, routing logits last."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    slots = (batch, tokens, topk, heads)
    gate = (*slots, key_size) if op == "gla" else slots
    return {
        "q": F.normalize(normal(*slots[: 3 if per_slot_q else 2], heads, key_size), dim=-1),
        "k": F.normalize(normal(*slots, key_size), dim=-1),
        "v": normal(*slots, value_size),
        "g": F.logsigmoid(normal(*gate)) if op in USES_GATE else None,
        "beta": torch.sigmoid(normal(*slots)) if op in USES_BETA else None,
        "initial_state": normal(batch, memories, heads, key_size, value_size),
        "logits": normal(batch, tokens, memories),
    }


def outputs_and_gradients(function, inputs, topk, dtype, mask=None, **options):
    leaves = {n: None if x is None else x.to(dtype).requires_grad_() for n, x in inputs.items()}
    logits = leaves["logits"]
    weights, indices, _ = mom_route(logits, topk, attention_mask=mask)
    arguments = {n: x for n, x in leaves.items() if n != "logits"}
    o, state = function(**arguments, weights=weights, indices=indices, num_memories=logits.shape[-1], **options)
    random = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(dtype) for x in (o, state)]
    wanted = [x for n, x in leaves.items() if x is not None and not (n == "logits" and topk == 1)]
    return [o, state, *torch.autograd.grad([o, state], wanted, upstream)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("memories", "topk", "tokens"), [(1, 1, 65), (4, 2, 1), (4, 2, 70), (3, 3, 20), (8, 1, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_packed_form_is_the_token_loop(op, memories, topk, tokens, dtype):
    inputs = draw(op, memories, topk, tokens=tokens, per_slot_q=tokens == 20)
    mask = torch.ones(2, tokens)
    mask[0, : tokens // 4] = 0
    if memories == 4:
        inputs["logits"][..., 2] = -20.0  # a memory without tokens
    got = outputs_and_gradients(mom_attention, inputs, topk, dtype, mask, op=op, output_final_state=True)
    need = outputs_and_gradients(mixture_of_memories, inputs, topk, torch.float64, mask)
    for x, y in zip(got, need, strict=True):
        assert x.dtype == dtype
        assert error(x, y) <= TOLERANCE[dtype]


def test_route_renormalises_the_chosen_and_sends_ties_to_the_lower_index():
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0], [1.0, 0.0, 1.0, 3.0]])
    weights, indices, same = mom_route(logits, 2)
    assert indices.tolist() == [[1, 2], [3, 0]]
    p = torch.softmax(logits[1], 0)
    expected = torch.stack([p[3], p[0]]) / (p[3] + p[0])
    assert torch.allclose(weights, torch.stack([torch.tensor([0.5, 0.5]), expected]), rtol=1e-6, atol=0)
    assert same is logits


def test_route_computes_logits_from_a_weight_and_in_float32():
    x, weight = torch.randn(2, 5, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    weights, indices, logits = mom_route(x, 2, weight=weight)
    assert torch.equal(logits, x @ weight.T)
    assert weights.dtype == torch.float32
    assert torch.equal(mom_route(logits.float(), 2)[0], weights)
    assert torch.equal(mom_route(logits.float(), 2)[1], indices)


def test_one_slot_has_weight_one_and_no_gradient():
    weights, _, _ = mom_route(torch.randn(3, 4, requires_grad=True), 1)
    assert torch.equal(weights, torch.ones(3, 1))
    assert not weights.requires_grad
    with pytest.warns(UserWarning, match="topk = 1"):
        MomAttention(8, 4, 2, num_memories=2, topk=1)


@pytest.mark.parametrize(
    ("logits", "topk", "options", "message"),
    [
        (torch.zeros(2, 4), 0, {}, "topk = 0"),
        (torch.zeros(2, 4), 5, {}, "topk = 5"),
        (torch.tensor([[0.0, float("nan")]]), 1, {}, "NaN"),
        (torch.zeros(2, 4), 1, {"attention_mask": torch.ones(3)}, r"attention_mask has shape \[3\]"),
    ],
)
def test_route_refuses(logits, topk, options, message):
    with pytest.raises(ValueError, match=message):
        mom_route(logits, topk, **options)


def test_a_weight_that_underflows_still_writes():
    """Rows are counted from indices: a share of exactly 0 does not unmake the write."""
    inputs = draw("delta_rule", 2, 2, batch=1, tokens=3)
    del inputs["logits"], inputs["initial_state"]
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 3, 2)
    indices = torch.tensor([0, 1]).expand(1, 3, 2)
    options = {"weights": weights, "indices": indices, "num_memories": 2}
    _, state = mom_attention(**inputs, **options, op="delta_rule", output_final_state=True)
    assert error(state, mixture_of_memories(**inputs, **options)[1]) <= 1e-10
    assert (state[0, 1] != 0).all()


@pytest.mark.parametrize("op", OPS)
def test_other_memories_are_left_alone_bit_for_bit(op):
    """No write and no decay where no token goes; a token of one memory changes nothing that another one reads."""
    inputs = draw(op, 3, 1, batch=1, tokens=40)
    del inputs["logits"]
    inputs = {n: None if x is None else x.float() for n, x in inputs.items()}
    weights, indices = torch.ones(1, 40, 1), torch.arange(40).remainder(2)[None, :, None]
    o, state = mom_attention(**inputs, weights=weights, indices=indices, num_memories=3, op=op, output_final_state=True)
    assert torch.equal(state[:, 2], inputs["initial_state"][:, 2])
    changed = {n: x.clone() if x is not None else None for n, x in inputs.items()}
    changed["v"][:, ::2] += 1.0
    other, _ = mom_attention(**changed, weights=weights, indices=indices, num_memories=3, op=op)
    assert torch.equal(o[:, 1::2], other[:, 1::2])
    assert not torch.equal(o[:, ::2], other[:, ::2])


@pytest.mark.parametrize("op", OPS)
def test_packed_sequences_are_the_loop_over_sequences_bit_for_bit(op):
    bounds = [0, 7, 7, 8, 40]
    inputs = draw(op, 3, 2, batch=1, tokens=40)
    states = torch.randn(4, 3, 2, 4, 3)
    logits = inputs.pop("logits").float()
    inputs = {n: None if x is None else x.float() for n, x in inputs.items() if n != "initial_state"}
    weights, indices, _ = mom_route(logits, 2)
    options = {"op": op, "output_final_state": True}
    o, final = mom_attention(
        **inputs,
        weights=weights,
        indices=indices,
        num_memories=3,
        initial_state=states,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        **options,
    )
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        one = {name: None if x is None else x[:, a:b] for name, x in inputs.items()}
        alone, last = mom_attention(
            **one,
            weights=weights[:, a:b],
            indices=indices[:, a:b],
            num_memories=3,
            initial_state=states[n : n + 1],
            **options,
        )
        assert torch.equal(o[:, a:b], alone)
        assert torch.equal(final[n], last[0])


def test_all_memories_chosen_is_the_weighted_sum_of_ordinary_layers():
    inputs = draw("gated_delta_rule", 3, 3, tokens=30)
    logits = inputs.pop("logits")
    del inputs["initial_state"]
    weights, indices, _ = mom_route(logits, 3)
    o, _ = mom_attention(**inputs, weights=weights, indices=indices, num_memories=3)
    total = torch.zeros_like(o)
    for m in range(3):
        slot = (indices == m).long().argmax(-1)
        k, v, g, beta = (
            x[torch.arange(2)[:, None], torch.arange(30), slot] for x in (inputs[n] for n in ("k", "v", "g", "beta"))
        )
        share = weights[torch.arange(2)[:, None], torch.arange(30), slot]
        total = total + share[..., None, None] * ops.chunk_gated_delta_rule(inputs["q"], k, v, g, beta)[0]
    assert error(o, total) <= 1e-10


@pytest.mark.parametrize("tokens", [0, 1])
def test_empty_and_single_token_sequences(tokens):
    inputs = draw("gated_delta_rule", 4, 2, tokens=tokens)
    weights, indices, _ = mom_route(inputs.pop("logits"), 2)
    o, state = mom_attention(**inputs, weights=weights, indices=indices, num_memories=4, output_final_state=True)
    assert o.shape == (2, tokens, 2, 3)
    if not tokens:
        assert torch.equal(state, inputs["initial_state"].float() if state.dtype == torch.float32 else state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "softmax"}, "op = 'softmax'"),
        ({"g": None}, "g is None"),
        ({"op": "delta_rule"}, "g has shape"),
        ({"op": "linear", "g": None}, "beta has shape"),
        ({"v": torch.zeros(2, 8, 2, 2, 3)}, "v has shape"),
        ({"q": torch.zeros(2, 9, 2, 5)}, "q has shape"),
        ({"indices": torch.full((2, 9, 2), 4)}, "out of range"),
        ({"indices": torch.full((2, 9, 2), -2)}, "out of range"),
        ({"initial_state": torch.zeros(2, 3, 2, 4, 3)}, "initial_state has shape"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens has shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    inputs = draw("gated_delta_rule", 4, 2)
    weights, indices, _ = mom_route(inputs.pop("logits"), 2)
    with pytest.raises(ValueError, match=message):
        mom_attention(**{**inputs, "weights": weights, "indices": indices, "num_memories": 4, **change})


def test_cu_seqlens_that_do_not_cover_the_tokens_are_refused():
    with pytest.raises(ValueError, match="from 0 to T = 5"):
        Dispatch.of(torch.zeros(1, 5, 1, dtype=torch.long), 2, torch.tensor([0, 4]))


def test_dispatch_keeps_time_order_and_counts_from_indices():
    indices = torch.tensor([[[1, 0], [-1, -1], [1, 2]], [[2, 1], [0, 1], [1, 2]]])
    dispatch = Dispatch.of(indices, 4)
    # segments: memory, then sequence; within one, time order
    assert dispatch.order.tolist() == [1, 8, 0, 4, 7, 9, 10, 5, 6, 11]
    assert dispatch.cu_seqlens.tolist() == [0, 1, 2, 4, 7, 8, 10, 10, 10]
    assert dispatch.sizes == (2, 5, 3, 0)
    assert dispatch.states().tolist() == [0, 4, 1, 1, 5, 5, 5, 2, 6, 6]


def layer_for(backend, seed=0, **options):
    """A small layer with weights far from zero, so that every path matters."""
    torch.manual_seed(seed)
    settings = {"hidden_size": 12, "head_dim": 4, "num_heads": 2, "expand_v": 1.5, "backend": backend, **options}
    layer = MomAttention(**settings)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


LAYERS = [
    ("gated_delta_rule", {}),
    ("gated_delta_rule", {"single_kv_proj": True, "shared_mem": False}),
    ("gated_delta_rule", {"use_short_conv": False, "num_memories": 8, "topk": 3}),
    ("delta_rule", {"num_memories": 2}),
    ("gla", {}),
    ("gla", {"single_kv_proj": True, "num_memories": 3}),
    ("linear", {"shared_mem": False}),
]


@pytest.mark.parametrize(("backend", "options"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_is_the_token_loop(backend, options, dtype):
    layer = layer_for(backend, **options)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, 21, 12)
    mask = torch.ones(2, 21)
    mask[0, :5] = mask[1, 9:11] = 0
    sizes = {"num_heads": 2, "topk": layer.topk, "op": backend, "shared": layer.shared_mem}

    def gradients(out, weights, leaf):
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
        return torch.autograd.grad(out, [leaf, *(weights[name] for name in names)], upstream)

    layer = layer.to(dtype)
    leaf = x.to(dtype).requires_grad_()
    cache = MixerCache()
    out, _, _ = layer(leaf, mask, cache)
    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact_leaf = x.double().requires_grad_()
    need, states = mom_layer(exact_leaf, exact, attention_mask=mask, **sizes)
    assert error(out, need) <= TOLERANCE[dtype]
    assert error(cache[0]["recurrent_state"], states) <= TOLERANCE[torch.float32]
    assert torch.equal(out[0, :5], torch.zeros_like(out[0, :5]))
    got = gradients(out, dict(layer.named_parameters()), leaf)
    for name, a, b in zip(["x", *names], got, gradients(need, exact, exact_leaf), strict=True):
        assert error(a, b) <= TOLERANCE[dtype], name


@pytest.mark.parametrize(("backend", "plain"), [("gated_delta_rule", GatedDeltaNet), ("delta_rule", DeltaNet)])
def test_one_memory_is_the_ordinary_layer_bit_for_bit(backend, plain):
    layer = layer_for(backend, num_memories=1, topk=1, shared_mem=False)
    sizes = {"head_dim": 4} if plain is GatedDeltaNet else {"expand_k": 8 / 12}
    other = plain(12, 2, expand_v=1.5 if plain is GatedDeltaNet else 1.0, use_gate=True, **sizes)
    weights = {n: p[0] if p.dim() == 3 and n != "conv.weight" else p for n, p in layer.state_dict().items()}
    del weights["router.weight"]
    other.load_state_dict(weights)
    x = torch.randn(1, 75, 12, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    # packed, because torch's convolution of a batch rounds otherwise than that of its rows joined
    bounds = torch.tensor([0, 4, 4, 70, 75])
    out, expected = layer(x, cu_seqlens=bounds)[0], other(y, cu_seqlens=bounds)[0]
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    got, need = torch.autograd.grad(out, x, upstream)[0], torch.autograd.grad(expected, y, upstream)[0]
    # the paths that meet in x are summed in another order
    assert error(got, need) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("backend", "options"), LAYERS)
def test_prefill_and_decode_are_the_full_forward(backend, options):
    layer = layer_for(backend, **options)
    x = torch.randn(3, 30, 12)
    mask = torch.ones(3, 30)
    mask[1, :6] = 0
    with torch.no_grad():
        full, _, _ = layer(x, mask)
        cache = MixerCache()
        parts = [layer(x[:, :9], mask[:, :9], cache, True)[0], layer(x[:, 9:14], mask[:, :14], cache, True)[0]]
        pool = cache[0]["recurrent_state"].data_ptr()
        parts += [layer(x[:, t : t + 1], mask[:, : t + 1], cache, True)[0] for t in range(14, 30)]
        whole = MixerCache()
        layer(x, mask, whole)
    assert error(torch.cat(parts, 1), full) <= 1e-4
    assert cache[0]["recurrent_state"].data_ptr() == pool  # steps write in place
    assert cache.get_seq_length() == 30
    for name, tensor in whole[0].items():
        assert error(cache[0][name], tensor) <= 1e-4


def test_decoding_from_a_cache_with_gradients_is_the_same_step():
    layer = layer_for("gated_delta_rule")
    x = torch.randn(2, 6, 12)
    caches = [MixerCache(), MixerCache()]
    for cache in caches:
        with torch.no_grad():
            layer(x[:, :5], None, cache)
    slow = layer(x[:, 5:], None, caches[0])[0]
    with torch.no_grad():
        fast = layer(x[:, 5:], None, caches[1])[0]
    assert slow.requires_grad
    assert error(fast, slow.detach()) <= 1e-5


def test_packed_rows_of_the_layer_do_not_see_each_other():
    layer = layer_for("gated_delta_rule").double()
    x = torch.randn(1, 25, 12, dtype=torch.float64)
    packed = layer(x, cu_seqlens=torch.tensor([0, 3, 3, 14, 25]))[0]
    alone = torch.cat([layer(x[:, a:b])[0] for a, b in ((0, 3), (3, 14), (14, 25))], 1)
    assert error(packed, alone) <= 1e-10


def test_router_logits_come_with_the_output_and_are_zero_at_padding():
    layer = layer_for("linear")
    x, mask = torch.randn(2, 7, 12), torch.ones(2, 7)
    mask[1, :3] = 0
    *_, logits = layer(x, mask, output_router_logits=True)
    expected = (x @ layer.router.weight.T) * mask[..., None]
    assert torch.allclose(logits, expected, rtol=0, atol=1e-6)
    collected = []
    layer(x, mask, router_logits=collected)
    assert collected[0].shape == (1, 11, 4)


def test_runs_and_gradients_repeat_bit_for_bit():
    layer = layer_for("gated_delta_rule")
    x = torch.randn(2, 50, 12)

    def once():
        layer.zero_grad()
        out = layer(x)[0]
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in layer.parameters())]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_layer_stays_near_its_float32_self():
    layer = layer_for("gated_delta_rule", hidden_size=32, head_dim=16)
    x = torch.randn(2, 40, 32)
    need = layer(x)[0]
    # The routing of the rounded model is its own, so only tokens that go the same way are compared.
    low = layer_for("gated_delta_rule", hidden_size=32, head_dim=16).bfloat16()
    assert low(x.bfloat16())[0].dtype == torch.bfloat16
    assert torch.isfinite(low(x.bfloat16())[0]).all()
    assert need.dtype == torch.float32


def test_grouped_linear_is_one_linear_a_group():
    linear = GroupedLinear(3, 5, 4, bias=True)
    nn.init.normal_(linear.bias)
    rows = torch.randn(6, 5)
    got = linear(rows, (2, 0, 4))
    assert torch.equal(got[:2], F.linear(rows[:2], linear.weight[0], linear.bias[0]))
    assert torch.equal(got[2:], F.linear(rows[2:], linear.weight[2], linear.bias[2]))
    assert linear(rows[:0], (0, 0, 0)).shape == (0, 4)


def test_balance_loss_is_k_when_even_and_larger_when_not():
    # every token prefers another memory: f is uniform, and so is the mean of p
    even = torch.eye(4).repeat(10, 1)[None]
    assert float(load_balancing_loss(even, 4, 2)) == pytest.approx(2.0, rel=1e-6)
    crowded = torch.zeros(1, 40, 4)
    crowded[..., 0] = 5.0
    p = torch.softmax(crowded[0, 0], 0)
    assert float(load_balancing_loss(crowded, 4, 1)) == pytest.approx(4 * float(p[0]), rel=1e-6)


def test_balance_loss_ignores_padding_and_takes_layers_together_or_one_by_one():
    first, second = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    mask = torch.ones(2, 6)
    mask[0, :4] = 0
    kept = [x[mask.bool()] for x in (first, second)]
    together = load_balancing_loss([first, second], 4, 2, mask)
    assert float(together) == pytest.approx(float(load_balancing_loss(torch.cat(kept), 4, 2)), rel=1e-6)
    layer_wise = load_balancing_loss([first, second], 4, 2, mask, layer_wise=True)
    assert float(layer_wise) == pytest.approx(sum(float(load_balancing_loss(x, 4, 2)) for x in kept) / 2, rel=1e-6)
    assert float(load_balancing_loss(first, 4, 2, torch.zeros(2, 6))) == 0.0


def test_balance_loss_pushes_tokens_away_from_a_crowded_memory():
    logits = torch.tensor([[2.0, 0.0, 0.0]]).repeat(5, 1).requires_grad_()
    load_balancing_loss(logits, 3, 1).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        ([], {}, "empty"),
        (torch.zeros(2, 3, 5), {}, "needed 4 in the last"),
        (torch.zeros(2, 3, 4), {"attention_mask": torch.ones(2, 2)}, "attention_mask has shape"),
    ],
)
def test_balance_loss_refuses(logits, options, message):
    with pytest.raises(ValueError, match=message):
        load_balancing_loss(logits, 4, 2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 5}, "topk = 5"),
        ({"backend": "softmax"}, "backend = 'softmax'"),
        ({"expand_v": 0.3}, "expand_v"),
        ({"num_heads": 0}, "num_heads = 0"),
    ],
)
def test_layer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        MomAttention(**{"hidden_size": 12, "head_dim": 4, "num_heads": 2, **options})


def test_layer_refuses_a_cache_of_another_batch():
    layer = layer_for("linear")
    cache = MixerCache()
    layer(torch.randn(2, 3, 12), None, cache)
    with pytest.raises(ValueError, match="holds 2 sequences"):
        layer(torch.randn(1, 3, 12), None, cache)


def language_model(**options):
    pytest.importorskip("transformers")
    from tilewright.nn import MomConfig, MomForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 8}
    model = MomForCausalLM(MomConfig(**{**sizes, **options}))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def test_language_model_adds_the_balance_of_all_layers_to_the_loss():
    model = language_model(aux_loss_scale=0.5)
    tokens = torch.randint(0, 50, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    out = model(tokens, attention_mask=mask, labels=tokens, output_router_logits=True)
    assert [list(x.shape) for x in out.router_logits] == [[1, 14, 4]] * 2
    balance = load_balancing_loss(out.router_logits, 4, 2)
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(out.aux_loss) == pytest.approx(float(balance), rel=1e-6)
    assert float(out.loss) == pytest.approx(float(plain + 0.5 * balance), rel=1e-6)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    layer_wise = language_model(aux_loss_scale=0.5, use_layer_wise_balance=True)
    found = float(layer_wise(tokens, attention_mask=mask, labels=tokens).aux_loss)
    assert found == pytest.approx(float(load_balancing_loss(out.router_logits, 4, 2, layer_wise=True)), rel=1e-5)


def test_language_model_generates_what_the_full_forward_chooses():
    model = language_model().eval()
    prompt, mask = torch.randint(1, 50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        full = model(out, attention_mask=F.pad(mask, (0, 12), value=1), use_cache=False).logits
    assert torch.equal(out[:, 7:], full[:, 6:-1].argmax(-1))


def test_language_model_survives_saving_and_mixes_with_softmax_layers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = language_model(attn={"layers": [1], "num_heads": 2}, num_memories=3, aux_loss_scale=0.25).eval()
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert other.config.layer_names == ["mom", "softmax"]
    assert (other.config.num_memories, other.config.aux_loss_scale) == (3, 0.25)
    tokens = torch.randint(0, 50, (2, 9))
    assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_language_models_of_one_seed_start_alike_with_xavier_linears():
    pytest.importorskip("transformers")
    from tilewright.nn import MomConfig, MomForCausalLM

    config = MomConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_heads=2, head_dim=16)
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(MomForCausalLM(config))
    for (name, p), (_, other) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.equal(p, other), name
    mixer = models[0].model.layers[0].mixer
    for weight in (mixer.q_proj.weight, mixer.k_proj.weight[0], mixer.k_proj.weight[4]):
        bound = 2**-2.5 * (6 / sum(weight.shape)) ** 0.5
        assert 0.9 * bound < float(weight.abs().max()) <= bound
    assert not torch.equal(mixer.k_proj.weight[0], mixer.k_proj.weight[1])
